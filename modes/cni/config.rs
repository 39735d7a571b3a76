//! What the plugin is given: its element of the network configuration on standard input, and `CNI_ARGS`.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{CniError, PodIp, SUPPORTED_VERSIONS};

/// The plugin's element of the chain. Unknown keys belong to others and are ignored; `prevResult` stays untouched.
#[derive(Debug, Clone, Deserialize)]
pub struct NetConf {
    /// CNI version of the list.
    #[serde(rename = "cniVersion", default)]
    pub cni_version: String,
    /// Result of the plugin before this one.
    #[serde(rename = "prevResult")]
    pub prev_result: Option<Value>,
    /// Directory of the agent's sockets.
    #[serde(default = "default_agent_run_dir")]
    pub cni_agent_run_dir: PathBuf,
    /// Whether pods are captured at all.
    #[serde(default)]
    pub ambient_enabled: bool,
    /// Namespaces whose pods are never captured.
    #[serde(default = "default_excluded_namespaces")]
    pub exclude_namespaces: Vec<String>,
    /// With GC: the attachments that exist.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<Attachment>>,
    /// Our own keys.
    #[serde(default)]
    pub ambidex: OwnKeys,
}

/// One attachment of a sandbox to the network.
#[derive(Debug, Clone, Deserialize)]
pub struct Attachment {
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// Identity of the pods of a runtime that passes no Kubernetes arguments.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OwnKeys {
    /// Namespace of the pods.
    pub namespace: Option<String>,
    /// Service account of the pods.
    pub service_account: Option<String>,
}

fn default_agent_run_dir() -> PathBuf {
    PathBuf::from("/var/run/ambidex")
}

fn default_excluded_namespaces() -> Vec<String> {
    vec!["kube-system".to_owned()]
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
        Ok(conf)
    }

    /// Addresses in `prevResult`.
    pub fn addresses(&self) -> Result<Vec<PodIp>, CniError> {
        let Some(ips) = self
            .prev_result
            .as_ref()
            .and_then(|result| result.get("ips"))
        else {
            return Ok(Vec::new());
        };
        let ips = ips
            .as_array()
            .ok_or_else(|| CniError::invalid_config("prevResult.ips is not a list"))?;
        ips.iter().map(parse_ip).collect()
    }
}

fn parse_ip(entry: &Value) -> Result<PodIp, CniError> {
    let text = entry
        .get("address")
        .and_then(Value::as_str)
        .ok_or_else(|| CniError::invalid_config("an entry of prevResult.ips has no address"))?;
    let address: IpNet = text.parse().map_err(|e| {
        CniError::invalid_config(format!(
            "prevResult.ips: {text:?} is not an address with prefix: {e}"
        ))
    })?;
    let gateway = match entry.get("gateway").and_then(Value::as_str) {
        None | Some("") => None,
        Some(text) => Some(text.parse::<IpAddr>().map_err(|e| {
            CniError::invalid_config(format!(
                "prevResult.ips: gateway {text:?} is not an address: {e}"
            ))
        })?),
    };
    Ok(PodIp {
        interface: entry.get("interface").and_then(Value::as_i64),
        address,
        gateway,
    })
}

/// `CNI_ARGS`: what the runtime says about the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs {
    /// `K8S_POD_NAME`.
    pub pod_name: String,
    /// `K8S_POD_NAMESPACE`.
    pub pod_namespace: String,
    /// `K8S_POD_UID`.
    pub pod_uid: String,
    /// `AMBIDEX_SERVICE_ACCOUNT`, for runtimes without a Kubernetes API behind them.
    pub service_account: String,
}

impl CniArgs {
    /// Parses `K=V;K=V`. An unknown key is an error unless `IgnoreUnknown` is `1` or `true`, as the specification's
    /// reference library has it.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let mut args = Self::default();
        let mut ignore_unknown = false;
        let mut unknown = None;
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| {
                CniError::invalid_environment(format!("CNI_ARGS: {pair:?} is not KEY=VALUE"))
            })?;
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = value == "1" || value.eq_ignore_ascii_case("true")
                }
                "K8S_POD_NAME" => value.clone_into(&mut args.pod_name),
                "K8S_POD_NAMESPACE" => value.clone_into(&mut args.pod_namespace),
                "K8S_POD_UID" => value.clone_into(&mut args.pod_uid),
                "AMBIDEX_SERVICE_ACCOUNT" => value.clone_into(&mut args.service_account),
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                other => unknown = Some(other),
            }
        }
        match unknown {
            Some(key) if !ignore_unknown => Err(CniError::invalid_environment(format!(
                "CNI_ARGS: unknown key {key:?} (pass IgnoreUnknown=1 to allow it)"
            ))),
            _ => Ok(args),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn unknown_arguments_are_an_error_unless_ignored() {
        assert_eq!(CniArgs::parse("FOO=1").unwrap_err().code, 4);
        assert!(CniArgs::parse("FOO=1;IgnoreUnknown=1").is_ok());
        let args =
            CniArgs::parse("IgnoreUnknown=true;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=c")
                .unwrap();
        assert_eq!(
            (
                args.pod_namespace.as_str(),
                args.pod_name.as_str(),
                args.pod_uid.as_str()
            ),
            ("a", "b", "c")
        );
    }

    #[test]
    fn a_configuration_says_what_is_wrong_with_it() {
        let code = |text: &str| {
            NetConf::parse(text.as_bytes())
                .map(|_| 0)
                .unwrap_or_else(|e| e.code)
        };
        assert_eq!(code("{"), 6);
        assert_eq!(code("{}"), 7);
        assert_eq!(code(r#"{"cniVersion":"0.2.0"}"#), 1);
        assert_eq!(
            code(r#"{"cniVersion":"1.0.0","ambidex":{"nameSpace":"x"}}"#),
            6
        );
        assert_eq!(code(r#"{"cniVersion":"1.0.0","unknown":1}"#), 0);
    }

    #[test]
    fn addresses_of_the_previous_result_are_read_with_their_gateways() {
        let conf = NetConf::parse(
            br#"{"cniVersion":"1.0.0","prevResult":{"ips":[{"interface":2,"address":"10.1.2.3/32","gateway":"10.1.2.1"}]}}"#,
        )
        .unwrap();
        let ips = conf.addresses().unwrap();
        assert_eq!(ips[0].address.to_string(), "10.1.2.3/32");
        assert_eq!(ips[0].gateway.unwrap().to_string(), "10.1.2.1");
        let bad = NetConf::parse(
            br#"{"cniVersion":"1.0.0","prevResult":{"ips":[{"address":"10.1.2.3"}]}}"#,
        )
        .unwrap();
        assert_eq!(bad.addresses().unwrap_err().code, 7);
    }

    proptest! {
        #[test]
        fn no_input_panics(input in proptest::collection::vec(any::<u8>(), 0..200), args in ".*") {
            let _ = NetConf::parse(&input).map(|conf| conf.addresses());
            let _ = CniArgs::parse(&args);
        }
    }
}
