//! The event that the plugin sends to the agent, in the field's encoding: `POST /cmdadd` with a JSON object whose
//! addresses are Go networks (IP as text, mask as base64 bytes). Keys of ours are added at the end.

use std::collections::BTreeSet;
use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use inpod_redirect::extent::Extent;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A pod that the runtime adds or deletes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodEvent {
    /// Path of the pod's network namespace, as the runtime sees it. May be empty on deletion.
    #[serde(default)]
    pub netns: String,
    /// Pod name.
    #[serde(default)]
    pub pod_name: String,
    /// Pod namespace.
    #[serde(default)]
    pub pod_namespace: String,
    /// Addresses of the pod.
    #[serde(rename = "IPs", default, deserialize_with = "null_is_empty")]
    pub ips: Vec<PodIp>,
    /// Pod UID; the field's plugin does not send it.
    #[serde(rename = "PodUID", default)]
    pub pod_uid: String,
    /// Service account; the field's agent asks the API server.
    #[serde(default)]
    pub service_account: String,
    /// Container (sandbox) id of the attachment.
    #[serde(rename = "ContainerID", default)]
    pub container_id: String,
    /// Name of the network that the sandbox is attached to.
    #[serde(default)]
    pub network: String,
    /// Interface of the attachment, in the sandbox.
    #[serde(default)]
    pub if_name: String,
    /// Whether the pod's DNS queries are captured, where the pod itself says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_capture: Option<bool>,
    /// How far the pod's capture reaches, where it is not as usual.
    #[serde(default, skip_serializing_if = "Extent::is_usual")]
    pub extent: Extent,
}

/// The attachments to a network that a runtime knows, when it has garbage collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ValidAttachments {
    /// Name of the network.
    pub network: String,
    /// All attachments to it.
    pub attachments: BTreeSet<Attachment>,
}

/// One attachment of a sandbox to the network, in the words of the CNI specification.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface in the sandbox.
    #[serde(rename = "ifname", default)]
    pub if_name: String,
}

/// One address of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodIp {
    /// Index into the result's interfaces.
    pub interface: Option<i64>,
    /// Address with prefix length.
    pub address: IpNet,
    /// Gateway.
    pub gateway: Option<IpAddr>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GoIpConfig {
    interface: Option<i64>,
    address: GoIpNet,
    gateway: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct GoIpNet {
    #[serde(rename = "IP")]
    ip: IpAddr,
    #[serde(rename = "Mask")]
    mask: String,
}

fn null_is_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PodIp>, D::Error> {
    Ok(Option::<Vec<PodIp>>::deserialize(deserializer)?.unwrap_or_default())
}

impl Serialize for PodIp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mask = match self.address.netmask() {
            IpAddr::V4(mask) => STANDARD.encode(mask.octets()),
            IpAddr::V6(mask) => STANDARD.encode(mask.octets()),
        };
        GoIpConfig {
            interface: self.interface,
            address: GoIpNet {
                ip: self.address.addr(),
                mask,
            },
            gateway: self.gateway.map(|gateway| gateway.to_string()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PodIp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let config = GoIpConfig::deserialize(deserializer)?;
        let mask = STANDARD
            .decode(&config.address.mask)
            .map_err(|e| D::Error::custom(format!("Address.Mask: {e}")))?;
        let prefix = mask.iter().map(|byte| byte.leading_ones()).sum::<u32>();
        let width = if config.address.ip.is_ipv4() { 4 } else { 16 };
        if mask.len() != width || mask != mask_bytes(prefix, width) {
            return Err(D::Error::custom(format!(
                "Address.Mask of {} is not a netmask of its family",
                config.address.ip
            )));
        }
        let prefix = u8::try_from(prefix).map_err(D::Error::custom)?;
        let address = IpNet::new(config.address.ip, prefix).map_err(D::Error::custom)?;
        let gateway = match config.gateway.as_deref() {
            None | Some("") => None,
            Some(text) => Some(
                text.parse()
                    .map_err(|e| D::Error::custom(format!("Gateway {text:?}: {e}")))?,
            ),
        };
        Ok(Self {
            interface: config.interface,
            address,
            gateway,
        })
    }
}

fn mask_bytes(prefix: u32, width: usize) -> Vec<u8> {
    (0..width)
        .map(|index| {
            let bits = prefix.saturating_sub(8 * index as u32).min(8);
            (0xff00_u16 >> bits) as u8
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_fields_encoding_is_understood_and_written() {
        let text = r#"{"Netns":"/run/netns/x","PodName":"a","PodNamespace":"b","IPs":[{"Interface":null,"Address":{"IP":"10.244.1.4","Mask":"/////w=="},"Gateway":"10.244.1.1"}]}"#;
        let event: PodEvent = serde_json::from_str(text).unwrap();
        assert_eq!(event.ips[0].address.to_string(), "10.244.1.4/32");
        assert_eq!(event.pod_uid, "");
        let written = serde_json::to_value(&event).unwrap();
        assert_eq!(written["IPs"][0]["Address"]["Mask"], "/////w==");
        assert_eq!(written["IPs"][0]["Gateway"], "10.244.1.1");
        assert!(
            serde_json::from_str::<PodEvent>(r#"{"IPs":null}"#)
                .unwrap()
                .ips
                .is_empty()
        );
    }

    #[test]
    fn a_mask_with_holes_or_of_the_wrong_family_is_refused() {
        for mask in ["/wD/AA==", "////", "AP///w=="] {
            let text = format!(r#"{{"IPs":[{{"Address":{{"IP":"10.0.0.1","Mask":"{mask}"}}}}]}}"#);
            assert!(serde_json::from_str::<PodEvent>(&text).is_err(), "{mask}");
        }
    }

    proptest! {
        #[test]
        fn addresses_survive_the_round_trip(bits in any::<u32>(), prefix in 0u8..=32, v6 in any::<u128>(), prefix6 in 0u8..=128) {
            for address in [IpNet::new(IpAddr::V4(bits.into()), prefix).unwrap(), IpNet::new(IpAddr::V6(v6.into()), prefix6).unwrap()] {
                let ip = PodIp { interface: Some(1), address, gateway: None };
                let text = serde_json::to_string(&ip).unwrap();
                prop_assert_eq!(serde_json::from_str::<PodIp>(&text).unwrap(), ip);
            }
        }

        #[test]
        fn no_body_panics(body in ".*") {
            let _ = serde_json::from_str::<PodEvent>(&body);
        }
    }
}
