//! `CNI_ARGS`: what the runtime, or whoever calls it, says about one sandbox.

use inpod_redirect::extent::Extent;

use super::{Captured, truth};
use crate::cni::CniError;

/// `CNI_ARGS`, taken apart. What is said here wins over the network's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniArgs {
    /// `K8S_POD_NAME`.
    pub pod_name: String,
    /// `K8S_POD_NAMESPACE`, or `AMBIDEX_NAMESPACE`, which wins.
    pub pod_namespace: String,
    /// `K8S_POD_UID`.
    pub pod_uid: String,
    /// `AMBIDEX_SERVICE_ACCOUNT`, for runtimes without a Kubernetes API behind them.
    pub service_account: String,
    /// `AMBIDEX_CAPTURE`: `labels` or `always`.
    pub capture: Option<Captured>,
    /// `AMBIDEX_DNS_CAPTURE`: a truth value.
    pub dns_capture: Option<bool>,
    /// `AMBIDEX_BYPASS_INBOUND_CAPTURE`: a truth value.
    pub bypass_inbound: Option<bool>,
    /// `AMBIDEX_VIRTUAL_INTERFACES`: names, separated by commas.
    pub virtual_interfaces: Option<String>,
}

impl CniArgs {
    /// How far the pod's capture reaches; what is not said here is as it is annotated.
    pub fn extent(&self, annotated: &Extent) -> Extent {
        let bypass_inbound = self.bypass_inbound.unwrap_or(annotated.bypass_inbound);
        let interfaces = annotated.virtual_interfaces.join(",");
        let interfaces = self.virtual_interfaces.as_ref().unwrap_or(&interfaces);
        Extent::of(Some(bypass_inbound), Some(interfaces))
    }

    /// Parses `K=V;K=V`. An unknown key is an error unless `IgnoreUnknown` is `1` or `true`, as the specification's
    /// reference library has it.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let wrong = |what: String| CniError::invalid_environment(format!("CNI_ARGS: {what}"));
        let mut args = Self::default();
        let mut own_namespace = None;
        let mut ignore_unknown = false;
        let mut unknown = None;
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong(format!("{pair:?} is not KEY=VALUE")))?;
            match key {
                "IgnoreUnknown" => {
                    ignore_unknown = value == "1" || value.eq_ignore_ascii_case("true")
                }
                "K8S_POD_NAME" => value.clone_into(&mut args.pod_name),
                "K8S_POD_NAMESPACE" => value.clone_into(&mut args.pod_namespace),
                "K8S_POD_UID" => value.clone_into(&mut args.pod_uid),
                "AMBIDEX_NAMESPACE" => own_namespace = Some(value.to_owned()),
                "AMBIDEX_SERVICE_ACCOUNT" => value.clone_into(&mut args.service_account),
                "AMBIDEX_CAPTURE" => {
                    args.capture = Some(match value {
                        "labels" => Captured::Labels,
                        "always" => Captured::Always,
                        _ => return Err(wrong(format!("{pair:?}: want labels or always"))),
                    });
                }
                "AMBIDEX_DNS_CAPTURE" | "AMBIDEX_BYPASS_INBOUND_CAPTURE" => {
                    let said = truth(value);
                    let said =
                        said.ok_or_else(|| wrong(format!("{pair:?}: want true or false")))?;
                    *match key {
                        "AMBIDEX_DNS_CAPTURE" => &mut args.dns_capture,
                        _ => &mut args.bypass_inbound,
                    } = Some(said);
                }
                "AMBIDEX_VIRTUAL_INTERFACES" => {
                    args.virtual_interfaces = Some(value.to_owned());
                }
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                other => unknown = Some(other),
            }
        }
        if let Some(namespace) = own_namespace {
            args.pod_namespace = namespace;
        }
        match unknown {
            Some(key) if !ignore_unknown => Err(wrong(format!(
                "unknown key {key:?} (pass IgnoreUnknown=1 to allow it)"
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
    fn our_own_arguments_win() {
        let args = CniArgs::parse("AMBIDEX_NAMESPACE=x;K8S_POD_NAMESPACE=a;AMBIDEX_CAPTURE=always")
            .unwrap();
        assert_eq!(args.pod_namespace, "x");
        assert_eq!(args.capture, Some(Captured::Always));
        assert_eq!(CniArgs::parse("AMBIDEX_CAPTURE=yes").unwrap_err().code, 4);
        let dns = |text| CniArgs::parse(text).map(|args| args.dns_capture);
        assert_eq!(dns("AMBIDEX_DNS_CAPTURE=false").unwrap(), Some(false));
        assert_eq!(dns("AMBIDEX_DNS_CAPTURE=no").unwrap_err().code, 4);
    }

    proptest! {
        #[test]
        fn no_arguments_panic(args in ".*") {
            let _ = CniArgs::parse(&args);
        }
    }
}
