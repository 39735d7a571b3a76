//! What the plugin is given: its element of the network configuration on standard input, and `CNI_ARGS`.

mod arguments;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use inpod_redirect::extent::{BYPASS_INBOUND, Extent, VIRTUAL_INTERFACES};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Attachment, CniError, PodIp, SUPPORTED_VERSIONS};

pub use arguments::CniArgs;

/// Names of the pods of a node agent and of a node proxy begin so. They are never captured: a node on which they wait for
/// each other would never have either.
const OWN_PODS: [&str; 4] = [
    "ambidex-agent-",
    "ambidex-proxy-",
    "istio-cni-node-",
    "ztunnel-",
];

/// The plugin's element of the chain. Unknown keys belong to others and are ignored; `prevResult` stays untouched.
#[derive(Debug, Clone, Deserialize)]
pub struct NetConf {
    /// CNI version of the list.
    #[serde(rename = "cniVersion", default)]
    pub cni_version: String,
    /// Name of the network.
    #[serde(default)]
    pub name: String,
    /// Result of the plugin before this one, byte by byte.
    #[serde(rename = "prevResult")]
    pub prev_result: Option<Box<RawValue>>,
    /// Directory of the agent's sockets.
    #[serde(default = "default_agent_run_dir")]
    pub cni_agent_run_dir: PathBuf,
    /// Whether pods are captured at all.
    #[serde(default)]
    pub ambient_enabled: bool,
    /// Namespaces whose pods are never captured.
    #[serde(default = "default_excluded_namespaces")]
    pub exclude_namespaces: Vec<String>,
    /// Namespace of the agent's and the proxy's own pods.
    #[serde(default)]
    pub pod_namespace: String,
    /// With GC: the attachments that exist.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<Attachment>>,
    /// Our own keys.
    #[serde(default)]
    pub ambidex: OwnKeys,
    /// What the runtime says for the capabilities of the plugin's configuration.
    #[serde(rename = "runtimeConfig", default)]
    pub runtime_config: Option<RuntimeConfig>,
}

/// The capability for which a runtime says a pod's annotations: containerd's name for it, and the key of what it then says.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// What a runtime says about one pod to plugins that ask for it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct RuntimeConfig {
    /// The pod's annotations; containerd gives them for the capability of this name.
    #[serde(rename = "io.kubernetes.cri.pod-annotations", default)]
    pub pod_annotations: Option<BTreeMap<String, String>>,
}

/// The annotation by which a pod says whether its DNS queries are captured, whatever the agent captures of others.
pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";

/// A truth value as the field reads it; none for what is none.
pub fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Which sandboxes of a network are captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Captured {
    /// Kubernetes pods; which of them, the agent knows from their labels.
    #[default]
    Labels,
    /// Every sandbox, whatever the runtime says or does not say about it.
    Always,
}

/// Identity of the pods of a runtime that passes no Kubernetes arguments.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OwnKeys {
    /// Namespace of the pods.
    pub namespace: Option<String>,
    /// Service account of the pods.
    pub service_account: Option<String>,
    /// Which sandboxes are captured.
    #[serde(default)]
    pub capture: Captured,
}

fn default_agent_run_dir() -> PathBuf {
    PathBuf::from("/var/run/ambidex")
}

fn default_excluded_namespaces() -> Vec<String> {
    vec!["kube-system".to_owned()]
}

/// What the specification allows in names of networks and in container ids.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

impl NetConf {
    /// Parses standard input.
    pub fn parse(input: &[u8]) -> Result<Self, CniError> {
        let conf: Self = serde_json::from_slice(input).map_err(|e| {
            CniError::decode(format!("the network configuration on standard input: {e}"))
        })?;
        if conf.cni_version.is_empty() {
            return Err(CniError::invalid_config(
                "the network configuration has no cniVersion",
            ));
        }
        if !SUPPORTED_VERSIONS.contains(&conf.cni_version.as_str()) {
            return Err(CniError::incompatible_version(format!(
                "cniVersion {:?} is not one of {}",
                conf.cni_version,
                SUPPORTED_VERSIONS.join(", ")
            )));
        }
        if !is_identifier(&conf.name) {
            return Err(CniError::invalid_config(format!(
                "the network's name {:?}: want letters, digits, '_', '.' and '-', beginning with a letter or digit",
                conf.name.chars().take(40).collect::<String>()
            )));
        }
        Ok(conf)
    }

    /// Fails unless the configuration's version has the verb, which came with `since`.
    pub fn require_version(&self, verb: &str, since: &str) -> Result<(), CniError> {
        let age = |version: &str| {
            SUPPORTED_VERSIONS
                .iter()
                .position(|known| *known == version)
        };
        if age(&self.cni_version) >= age(since) {
            return Ok(());
        }
        Err(CniError::incompatible_version(format!(
            "{verb} is not part of CNI {}: it came with {since}",
            self.cni_version
        )))
    }

    /// Whether this is a pod of the agent or the proxy itself.
    pub fn is_own_pod(&self, namespace: &str, name: &str) -> bool {
        !self.pod_namespace.is_empty()
            && namespace == self.pod_namespace
            && OWN_PODS.iter().any(|own| name.starts_with(own))
    }

    /// What the pod's annotation says of its DNS queries; nothing, if it says no truth value.
    pub fn dns_capture(&self) -> Option<bool> {
        truth(self.annotation(DNS_CAPTURE)?)
    }

    /// What the pod's annotations say of how far its capture reaches; a truth value that is none says nothing.
    pub fn extent(&self) -> Extent {
        let bypass_inbound = self.annotation(BYPASS_INBOUND).and_then(truth);
        Extent::of(bypass_inbound, self.annotation(VIRTUAL_INTERFACES))
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        let annotations = self.runtime_config.as_ref()?.pod_annotations.as_ref()?;
        annotations.get(key).map(String::as_str)
    }

    /// Addresses in `prevResult`.
    pub fn addresses(&self) -> Result<Vec<PodIp>, CniError> {
        let Some(result) = &self.prev_result else {
            return Ok(Vec::new());
        };
        let result: Value = serde_json::from_str(result.get())
            .map_err(|e| CniError::decode(format!("prevResult: {e}")))?;
        if !result.is_object() {
            return Err(CniError::invalid_config("prevResult is not an object"));
        }
        match result.get("ips") {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(ips)) => ips.iter().map(parse_ip).collect(),
            Some(_) => Err(CniError::invalid_config("prevResult.ips is not a list")),
        }
    }
}

fn parse_ip(entry: &Value) -> Result<PodIp, CniError> {
    let wrong = |what: String| CniError::invalid_config(format!("prevResult.ips: {what}"));
    let Some(text) = entry.get("address").and_then(Value::as_str) else {
        return Err(wrong("an entry has no address".to_owned()));
    };
    let address: IpNet = text
        .parse()
        .map_err(|e| wrong(format!("{text:?} is not an address with prefix: {e}")))?;
    let gateway = match entry.get("gateway") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(Value::String(text)) => Some(
            text.parse::<IpAddr>()
                .map_err(|e| wrong(format!("gateway {text:?} is not an address: {e}")))?,
        ),
        Some(other) => return Err(wrong(format!("gateway {other} is not an address"))),
    };
    let interface = match entry.get("interface") {
        None | Some(Value::Null) => None,
        Some(index) => Some(
            index
                .as_i64()
                .ok_or_else(|| wrong(format!("interface {index} is not an index")))?,
        ),
    };
    Ok(PodIp {
        interface,
        address,
        gateway,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_configuration_says_what_is_wrong_with_it() {
        let code = |text: &str| {
            NetConf::parse(text.as_bytes())
                .map(|_| 0)
                .unwrap_or_else(|e| e.code)
        };
        assert_eq!(code("{"), 6);
        assert_eq!(code("{}"), 7);
        assert_eq!(code(r#"{"cniVersion":"0.2.0","name":"n"}"#), 1);
        assert_eq!(code(r#"{"cniVersion":"1.0.0"}"#), 7);
        assert_eq!(code(r#"{"cniVersion":"1.0.0","name":"../n"}"#), 7);
        assert_eq!(
            code(r#"{"cniVersion":"1.0.0","name":"n","ambidex":{"nameSpace":"x"}}"#),
            6
        );
        assert_eq!(
            code(r#"{"cniVersion":"1.0.0","name":"n","ambidex":{"capture":"maybe"}}"#),
            6
        );
        assert_eq!(code(r#"{"cniVersion":"1.0.0","name":"n","unknown":1}"#), 0);
    }

    #[test]
    fn annotations_of_the_pod_come_with_the_runtimes_configuration() {
        let said = |runtime: &str| {
            let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","runtimeConfig":{runtime}}}"#);
            NetConf::parse(text.as_bytes()).unwrap().dns_capture()
        };
        let annotated = |value: &str| {
            said(&format!(
                r#"{{"{POD_ANNOTATIONS}":{{"a":"b","{DNS_CAPTURE}":"{value}"}}}}"#
            ))
        };
        assert_eq!(annotated("false"), Some(false));
        assert_eq!(annotated("True"), Some(true));
        assert_eq!(annotated("maybe"), None);
        assert_eq!(said("{}"), None);
        assert_eq!(said("null"), None);
    }

    #[test]
    fn how_far_a_capture_reaches_is_annotated_or_said_by_who_calls() {
        let text = format!(
            r#"{{"cniVersion":"1.0.0","name":"n","runtimeConfig":{{"{POD_ANNOTATIONS}":{{"{BYPASS_INBOUND}":"true","{VIRTUAL_INTERFACES}":"a, b"}}}}}}"#
        );
        let annotated = NetConf::parse(text.as_bytes()).unwrap().extent();
        assert!(annotated.bypass_inbound);
        assert_eq!(annotated.virtual_interfaces, ["a", "b"]);
        let args = |text: &str| CniArgs::parse(text).unwrap().extent(&annotated);
        assert_eq!(args(""), annotated);
        let said = args("AMBIDEX_BYPASS_INBOUND_CAPTURE=false;AMBIDEX_VIRTUAL_INTERFACES=c");
        assert_eq!(said, Extent::of(None, Some("c")));
        let wrong = CniArgs::parse("AMBIDEX_BYPASS_INBOUND_CAPTURE=perhaps");
        assert_eq!(wrong.unwrap_err().code, 4);
    }

    #[test]
    fn a_verb_is_refused_to_versions_that_do_not_have_it() {
        let conf = |version: &str| {
            NetConf::parse(format!(r#"{{"cniVersion":"{version}","name":"n"}}"#).as_bytes())
                .unwrap()
        };
        assert_eq!(
            conf("0.3.1")
                .require_version("CHECK", "0.4.0")
                .unwrap_err()
                .code,
            1
        );
        assert!(conf("0.4.0").require_version("CHECK", "0.4.0").is_ok());
        assert_eq!(
            conf("1.0.1")
                .require_version("GC", "1.1.0")
                .unwrap_err()
                .code,
            1
        );
        assert!(conf("1.1.0").require_version("GC", "1.1.0").is_ok());
    }

    #[test]
    fn addresses_of_the_previous_result_are_read_in_every_version() {
        let addresses = |result: &str| {
            let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","prevResult":{result}}}"#);
            NetConf::parse(text.as_bytes()).unwrap().addresses()
        };
        let ips =
            addresses(r#"{"ips":[{"interface":2,"address":"10.1.2.3/32","gateway":"10.1.2.1"}]}"#)
                .unwrap();
        assert_eq!(ips[0].address.to_string(), "10.1.2.3/32");
        assert_eq!(ips[0].gateway.unwrap().to_string(), "10.1.2.1");
        assert_eq!(ips[0].interface, Some(2));
        // Results of versions before 1.0.0 name the family besides.
        let ips = addresses(r#"{"ips":[{"version":"4","address":"10.1.2.3/24"}]}"#).unwrap();
        assert_eq!(ips[0].address.to_string(), "10.1.2.3/24");
        for wrong in [
            r#"{"ips":[{"address":"10.1.2.3"}]}"#,
            r#"{"ips":[{"address":"10.1.2.3/32","gateway":7}]}"#,
            r#"{"ips":[{"address":"10.1.2.3/32","interface":"eth0"}]}"#,
            r#"{"ips":"10.1.2.3/32"}"#,
            r#"[]"#,
        ] {
            assert_eq!(addresses(wrong).unwrap_err().code, 7, "{wrong}");
        }
    }

    #[test]
    fn pods_of_the_agent_and_the_proxy_are_known_by_namespace_and_name() {
        let conf =
            NetConf::parse(br#"{"cniVersion":"1.0.0","name":"n","pod_namespace":"mesh"}"#).unwrap();
        assert!(conf.is_own_pod("mesh", "ztunnel-x1"));
        assert!(!conf.is_own_pod("other", "ztunnel-x1"));
        assert!(!conf.is_own_pod("mesh", "shop-x1"));
        let nowhere = NetConf::parse(br#"{"cniVersion":"1.0.0","name":"n"}"#).unwrap();
        assert!(!nowhere.is_own_pod("", "ztunnel-x1"));
    }

    proptest! {
        #[test]
        fn no_input_panics(input in proptest::collection::vec(any::<u8>(), 0..200), result in ".*") {
            let _ = NetConf::parse(&input).map(|conf| conf.addresses());
            let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","prevResult":{result}}}"#);
            let _ = NetConf::parse(text.as_bytes()).map(|conf| conf.addresses());
        }
    }
}
