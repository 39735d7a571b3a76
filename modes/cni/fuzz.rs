//! What a runtime pipes into the plugin, and what the plugin sends to the agent.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use fuzz_driver::{Target, Verdict};
use inpod_redirect::extent::Extent;

use super::{CniArgs, NetConf, PodEvent};

const CONFIGURATION: &str = r#"{"cniVersion":"1.0.0","name":"k8s","type":"ambidex-cni","cni_agent_run_dir":"/run/x","ambient_enabled":true,
"exclude_namespaces":["a"],"cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}],"ambidex":{"namespace":"n","serviceAccount":"s"},
"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/x"}],
"ips":[{"interface":0,"address":"10.1.2.3/24","gateway":"10.1.2.1"},{"address":"fd00::5/64","gateway":""}]}}"#;

/// The configuration, a line of its own, `CNI_ARGS`.
#[test]
fn cni_configuration() {
    let seeds = [
        format!(
            "{CONFIGURATION}\0IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=c;X=y"
        ),
        r#"{"cniVersion":"1.1.0","unknown":{"a":[1,2,{}]}}"#.to_owned() + "\0",
        r#"{"cniVersion":"0.3.1","prevResult":{"ips":[]}}"#.to_owned()
            + "\0AMBIDEX_SERVICE_ACCOUNT=s",
    ];
    let words: &[&[u8]] = &[
        b"\0",
        b";",
        b"=",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\"",
        b"null",
        b"\"ips\":",
        b"\"address\":\"",
        b"/32",
        b"\"cniVersion\":\"",
        b"[[[[[[[[",
        b"\\u0000",
        b"1e999",
    ];
    let target = Target::new("cni-config", seeds.map(String::into_bytes)).words(words);
    target.run(|input| {
        let at = input.iter().position(|byte| *byte == 0);
        let (conf, args) = input.split_at(at.unwrap_or(input.len()));
        let args = String::from_utf8_lossy(args.get(1..).unwrap_or_default());
        let read = NetConf::parse(conf)
            .and_then(|conf| conf.addresses())
            .and_then(|ips| Ok((ips, CniArgs::parse(&args)?)));
        let (ips, args) = match read {
            Ok(read) => read,
            Err(error) => {
                assert!([1, 4, 6, 7].contains(&error.code), "{error:?}");
                assert!(!error.details.is_empty());
                return Verdict::refused(error);
            }
        };
        let extent = args.extent(&Extent::default());
        let event = PodEvent {
            netns: "/run/netns/x".to_owned(),
            pod_name: args.pod_name,
            pod_namespace: args.pod_namespace,
            ips,
            pod_uid: args.pod_uid,
            service_account: args.service_account,
            container_id: "c".to_owned(),
            network: "n".to_owned(),
            if_name: "eth0".to_owned(),
            dns_capture: Some(false),
            extent,
        };
        let written = serde_json::to_vec(&event).unwrap();
        assert_eq!(serde_json::from_slice::<PodEvent>(&written).unwrap(), event);
        Verdict::Taken(if event.ips.is_empty() {
            "no address"
        } else {
            "addresses"
        })
    });
}
