//! Packets that neither our agent nor our proxy would send.

use fuzz_driver::{Target, Verdict};

use super::*;

/// Written and read again, it is the same.
fn settles<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M) {
    let written = message.encode_to_vec();
    assert_eq!(written.len(), message.encoded_len());
    assert_eq!(&M::decode(written.as_slice()).unwrap(), message);
}

#[test]
fn zds_packets() {
    let request = |request| WorkloadRequest::from(request).encode_to_vec();
    let add = AddWorkload {
        uid: "0a1b2c3d-0000-4000-8000-000000000001".to_owned(),
        workload_info: Some(info()),
        capture_mode: CaptureMode::Node.into(),
        addresses: vec![vec![10, 0, 0, 1], vec![0; 16]],
        guests: true,
    };
    let configure = ConfigureNode {
        flow: "hybrid".to_owned(),
        same_node: "hbone".to_owned(),
        node_addresses: vec![vec![10, 0, 0, 2]],
    };
    let del = DelWorkload {
        uid: "u".to_owned(),
        drain_millis: Some(300),
    };
    let uid = "u".to_owned();
    let state = StateReply {
        workloads: vec![WorkloadState {
            uid: uid.clone(),
            up: true,
            connections: 1 << 40,
            ..WorkloadState::default()
        }],
        total: 1,
    };
    let seeds = [
        request(Request::Add(add)),
        request(Request::ConfigureNode(configure)),
        request(Request::Del(del)),
        request(Request::Keep(KeepWorkload { uid })),
        request(Request::SnapshotSent(SnapshotSent {})),
        request(Request::GetNetns(GetNetns {})),
        WorkloadResponse::ack("no").encode_to_vec(),
        WorkloadResponse::from(Response::State(state)).encode_to_vec(),
        ZdsHello {
            version: 1,
            extension_version: 1,
        }
        .encode_to_vec(),
    ];
    // Keys of the messages' fields, of groups and of nothing.
    let words: &[&[u8]] = &[
        b"\x0a",
        b"\x12",
        b"\x1a",
        b"\x22\x02",
        b"\x2a",
        b"\xc0\x3e\x01",
        b"\xc2\x3e",
        b"\xca\x3e\x04",
        b"\xd2\x3e\x00",
        b"\xda\x3e\x04",
        b"\xe2\x3e\x04",
        b"\x0b",
        b"\x0c",
        b"\xff\xff\xff\xff\x0f",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x80\x80\x80\x80\x80",
    ];
    Target::new("zds-packets", seeds).words(words).run(|input| {
        let _ = ZdsHello::decode(input).inspect(settles);
        let _ = WorkloadResponse::decode(input).inspect(settles);
        let request = match WorkloadRequest::decode(input) {
            Err(error) => return Verdict::refused(error),
            Ok(request) => request,
        };
        settles(&request);
        Verdict::Taken(match request.payload {
            None => return Verdict::refused("an unknown request"),
            Some(Request::Add(add)) => match decode_addresses(&add.addresses) {
                Ok(addresses) => {
                    assert_eq!(encode_addresses(&addresses), add.addresses);
                    "add"
                }
                Err(length) => {
                    assert!(length != 4 && length != 16);
                    return Verdict::refused("an address of another length");
                }
            },
            Some(Request::Del(_)) => "del",
            Some(Request::SnapshotSent(_)) => "snapshot",
            Some(Request::Keep(_)) => "keep",
            Some(Request::GetNetns(_)) => "netns",
            Some(Request::ConfigureNode(_)) => "configure",
            Some(Request::GetState(_)) => "state",
            Some(Request::Hold(_)) => "hold",
            Some(Request::Release(_)) => "release",
        })
    });
}
