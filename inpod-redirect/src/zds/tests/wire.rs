//! The bytes on the wire, typed in from the protocol's field numbers.

use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

/// The message has these bytes, and these bytes are the message.
fn fixture<M: Message + Default + PartialEq + std::fmt::Debug>(message: M, bytes: &str) {
    assert_eq!(message.encode_to_vec(), hex(bytes), "{message:?}");
    assert_eq!(M::decode(hex(bytes).as_slice()).unwrap(), message);
}

fn request(request: Request, bytes: &str) {
    fixture(WorkloadRequest::from(request), bytes);
}

#[test]
fn hello_travels_bare() {
    let plain = ZdsHello {
        version: Version::V1.into(),
        extension_version: 0,
    };
    fixture(plain, "08 01");
    let extended = ZdsHello {
        version: Version::V1.into(),
        extension_version: 1,
    };
    fixture(extended, "08 01 c0 3e 01");
}

fn plain_add() -> AddWorkload {
    AddWorkload {
        uid: "u1".to_owned(),
        workload_info: Some(WorkloadInfo {
            name: "n".to_owned(),
            namespace: "ns".to_owned(),
            service_account: "sa".to_owned(),
        }),
        ..AddWorkload::default()
    }
}

#[test]
fn requests_of_the_field() {
    request(
        Request::Add(plain_add()),
        "0a 11 0a 02 75 31 12 0b 0a 01 6e 12 02 6e 73 1a 02 73 61",
    );
    let without_info = AddWorkload {
        uid: "u1".to_owned(),
        ..AddWorkload::default()
    };
    request(Request::Add(without_info), "0a 04 0a 02 75 31");
    let del = DelWorkload {
        uid: "u1".to_owned(),
        drain_millis: None,
    };
    request(Request::Del(del), "12 04 12 02 75 31");
    request(Request::SnapshotSent(SnapshotSent {}), "1a 00");
    let keep = KeepWorkload {
        uid: "u1".to_owned(),
    };
    request(Request::Keep(keep), "2a 04 0a 02 75 31");
}

#[test]
fn responses_of_the_field() {
    fixture(WorkloadResponse::ack(""), "0a 00");
    fixture(WorkloadResponse::ack("no"), "0a 04 0a 02 6e 6f");
}

#[test]
fn requests_of_the_extension() {
    let add = AddWorkload {
        capture_mode: CaptureMode::Node.into(),
        addresses: vec![vec![10, 244, 1, 4]],
        ..plain_add()
    };
    request(
        Request::Add(add),
        "0a 1b 0a 02 75 31 12 0b 0a 01 6e 12 02 6e 73 1a 02 73 61 c0 3e 01 ca 3e 04 0a f4 01 04",
    );
    let add = AddWorkload {
        guests: true,
        ..plain_add()
    };
    request(
        Request::Add(add),
        "0a 14 0a 02 75 31 12 0b 0a 01 6e 12 02 6e 73 1a 02 73 61 d0 3e 01",
    );
    let del = DelWorkload {
        uid: "u1".to_owned(),
        drain_millis: Some(5000),
    };
    request(Request::Del(del), "12 08 12 02 75 31 c0 3e 88 27");
    // Zero is not the same as nothing: it cuts.
    let cut = DelWorkload {
        uid: "u1".to_owned(),
        drain_millis: Some(0),
    };
    request(Request::Del(cut), "12 07 12 02 75 31 c0 3e 00");
    request(Request::GetNetns(GetNetns {}), "c2 3e 00");
    let configure = ConfigureNode {
        flow: "h".to_owned(),
        same_node: "d".to_owned(),
        node_addresses: vec![vec![10, 0, 0, 1]],
    };
    request(
        Request::ConfigureNode(configure),
        "ca 3e 0c 0a 01 68 12 01 64 1a 04 0a 00 00 01",
    );
    request(Request::GetState(GetState {}), "d2 3e 00");
}

#[test]
fn responses_of_the_extension() {
    fixture(
        WorkloadResponse::from(Response::Netns(NetnsReply {})),
        "c2 3e 00",
    );
    let state = StateReply {
        workloads: vec![WorkloadState {
            uid: "u".to_owned(),
            capture_mode: CaptureMode::Inpod.into(),
            up: true,
            connections: 3,
            error: String::new(),
        }],
        total: 1,
    };
    fixture(
        WorkloadResponse::from(Response::State(state)),
        "d2 3e 0d 0a 09 0a 01 75 10 02 18 01 20 03 10 01",
    );
}

#[test]
fn fields_may_come_in_any_order_and_unknown_ones_are_skipped() {
    // workload_info before uid, its fields reversed, the reserved field 4 and an unknown field 99 in between.
    let bytes = hex(
        "0a 1b 12 10 1a 02 73 61 22 03 74 2e 64 12 02 6e 73 0a 01 6e 9a 06 02 68 69 0a 02 75 31",
    );
    let read = WorkloadRequest::decode(bytes.as_slice()).unwrap();
    assert_eq!(read.payload, Some(Request::Add(plain_add())));
}

#[test]
fn hellos_and_answers_may_hold_more_than_we_know() {
    let read = |text| ZdsHello::decode(hex(text).as_slice()).unwrap();
    // A text in field 5, eight bytes in field 9, the version in more bytes than it needs, four bytes in field 12.
    let hello = read("2a 02 68 69 49 00 00 00 00 00 00 00 01 08 81 80 00 65 00 00 00 01");
    assert_eq!((hello.version, hello.extension_version), (1, 0));
    // A version that does not exist yet is kept as it is.
    assert_eq!(read("08 07").version, 7);
    let answer = |text| WorkloadResponse::decode(hex(text).as_slice()).unwrap();
    assert_eq!(
        answer("10 07 0a 09 12 01 78 0a 02 6e 6f 18 01"),
        WorkloadResponse::ack("no")
    );
    assert_eq!(answer("12 00").payload, None);
    let request = |text| {
        WorkloadRequest::decode(hex(text).as_slice())
            .unwrap()
            .payload
    };
    let del = Request::Del(DelWorkload {
        uid: "u1".to_owned(),
        drain_millis: None,
    });
    // Number 1 means nothing in a deletion.
    assert_eq!(request("12 08 0a 02 6e 6f 12 02 75 31"), Some(del));
    let keep = Request::Keep(KeepWorkload {
        uid: "u1".to_owned(),
    });
    assert_eq!(
        request("82 7d 00 2a 06 10 03 0a 02 75 31 30 01"),
        Some(keep)
    );
    assert_eq!(
        request("1a 02 08 01"),
        Some(Request::SnapshotSent(SnapshotSent {}))
    );
}

#[test]
fn an_unknown_request_is_seen_as_such() {
    let read = WorkloadRequest::decode(hex("22 02 0a 00").as_slice()).unwrap();
    assert_eq!(read.payload, None);
}

#[test]
fn addresses_are_four_or_sixteen_bytes() {
    let both: Vec<IpAddr> = vec!["10.1.2.3".parse().unwrap(), "fd00::7".parse().unwrap()];
    assert_eq!(decode_addresses(&encode_addresses(&both)), Ok(both));
    assert_eq!(decode_addresses(&[vec![1, 2, 3]]), Err(3));
}

proptest! {
    #[test]
    fn no_bytes_make_parsing_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = ZdsHello::decode(bytes.as_slice());
        let _ = WorkloadResponse::decode(bytes.as_slice());
        if let Ok(request) = WorkloadRequest::decode(bytes.as_slice()) {
            // What can be read can be written and read again.
            let again = WorkloadRequest::decode(request.encode_to_vec().as_slice()).unwrap();
            prop_assert_eq!(again, request);
        }
    }
}
