//! Records that something else than this program wrote, or only half.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use fuzz_driver::{Target, Verdict};

use super::*;
use crate::commands::{as_commands, as_removal_commands};

const EVERYTHING: &str = r#"{"plan":{"name":"host-node","steps":[
{"step":"link","name":"istioin","overlay":"geneve","vni":1000,"remote":"10.0.0.1","port":6081,"mtu":1450},
{"step":"address","dev":"istioin","addr":"192.168.126.1/30"},
{"step":"rule","priority":100,"fwmark":{"value":512,"mask":512},"action":{"goto":32766}},
{"step":"rule","priority":103,"fwmark":null,"action":{"lookup":100}},
{"step":"route","table":100,"dst":"10.0.0.1/32","dev":"istioin","via":"192.168.126.2","src":"10.0.0.9","onlink":true,"kind":"unicast","scope":"global"},
{"step":"route","table":100,"dst":"0.0.0.0/0","dev":"lo","via":null,"src":null,"onlink":false,"kind":"local","scope":"host"},
{"step":"sysctl","key":"net/ipv4/conf/all/rp_filter","value":"0"},
{"step":"chain","family":"v4","table":"mangle","name":"ztunnel-PREROUTING","rules":["-i istioin -j RETURN","-p udp -m comment --comment \"a b\" -j MARK --set-xmark 0x1/0x1"],"jump":{"from":"PREROUTING","position":"first"}},
{"step":"chain-rule","family":"v6","table":"nat","chain":"OUTPUT","rule":"-o lo -j ACCEPT","position":"last"},
{"step":"set","name":"ztunnel-pods-ips","comments":true},
{"step":"member","set":"ztunnel-pods-ips","ip":"10.0.0.4","comment":"uid"}]},
"place_label":"host","netns":{"dev":4,"ino":4026531840},"netns_path":null,"boot_id":"b","previous_sysctls":{"net/ipv4/conf/all/rp_filter":"1"},
"preexisting":[{"step":"chain","family":"v4","table":"raw","name":"x","rules":[],"jump":null}],
"nft_caused":[{"family":"v4","table":"nat","chain":null},{"family":"v6","table":"filter","chain":"FORWARD"}],"iptables":IPTABLES}"#;

#[test]
fn journal_records() {
    let iptables = Iptables::both(crate::iptables::Variant::Legacy);
    let iptables = serde_json::to_string(&iptables).unwrap();
    let everything = EVERYTHING.replace("IPTABLES", &iptables);
    let short = everything.split_once("[\n").unwrap().0.to_owned()
        + "[]},"
        + everything.split_once("]},\n").unwrap().1;
    let words: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"null",
        b"\"step\":\"member\"",
        b"\\u0000",
        b"\\ud800",
        b"\n-A X",
        b"1e99",
        b"\"'$(x)'\"",
    ];
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path()).unwrap();
    let file = directory.path().join("fuzz.json");
    let mut number = 0_u32;
    Target::new("journal", [everything, short])
        .words(words)
        .run(|input| {
            number += 1;
            let read = serde_json::from_slice::<Record>(input);
            // From a file now and then: files take long.
            if number.is_multiple_of(1000) {
                fs::write(&file, input).unwrap();
                match (journal.load("fuzz"), &read) {
                    (Ok(loaded), Ok(read)) => assert_eq!(loaded.as_ref(), Some(read)),
                    (Err(error), Err(_)) => assert!(error.to_string().contains("fuzz.json")),
                    (loaded, read) => panic!("{loaded:?} but {read:?}"),
                }
                fs::remove_file(&file).unwrap();
            }
            match read {
                Err(error) => Verdict::refused(error),
                Ok(record) => {
                    let _ = as_commands(&record.plan);
                    let _ = as_removal_commands(&record.plan);
                    let written = serde_json::to_vec(&record).unwrap();
                    assert_eq!(serde_json::from_slice::<Record>(&written).unwrap(), record);
                    Verdict::Taken(if record.plan.steps.is_empty() {
                        "empty"
                    } else {
                        "record"
                    })
                }
            }
        });
}
