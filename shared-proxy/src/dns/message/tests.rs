#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

const ID: u16 = 0x1234;

fn query(name: &str, kind: RecordType, edns: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.id = ID;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(true);
        message.set_edns(edns);
    }
    message
}

fn question(message: &Message, transport: Transport) -> Question {
    match read(&message.to_vec().unwrap(), transport) {
        Incoming::Question(question) => *question,
        other => panic!("{other:?}"),
    }
}

fn v4(count: u16) -> Vec<IpAddr> {
    let ip = |n: u16| IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + u32::from(n)));
    (0..count).map(ip).collect()
}

fn refused(bytes: &[u8]) -> Message {
    match read(bytes, Transport::Udp) {
        Incoming::Refuse(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_says_who_it_is_for_and_echoes_edns() {
    let asked = query("Web.Alpha.", RecordType::A, Some(4096));
    let question = question(&asked, Transport::Udp);
    assert_eq!(question.hostname().as_deref(), Some("web.alpha"));
    let bytes = question.addresses(&v4(2), Some("web"));
    let answer = Message::from_vec(&bytes).unwrap();
    let meta = &answer.metadata;
    assert_eq!((meta.id, meta.message_type), (ID, MessageType::Response));
    assert!(meta.authoritative && meta.recursion_desired && meta.recursion_available);
    // As it was written: clients compare it to tell forged answers.
    assert!(answer.queries[0].name.eq_case(&asked.queries[0].name));
    let edns = answer.edns.as_ref().unwrap();
    assert_eq!(edns.max_payload(), LARGEST_UDP);
    assert!(edns.flags().dnssec_ok);
    let lines: Vec<_> = answer.answers.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "Web.Alpha. 30 IN CNAME web.",
            "web. 30 IN A 10.0.0.0",
            "web. 30 IN A 10.0.0.1"
        ]
    );
    let without = question_without_edns().addresses(&[], Some("web"));
    let without = Message::from_vec(&without).unwrap();
    assert!(without.edns.is_none() && without.answers.is_empty());
    assert_eq!(without.metadata.response_code, ResponseCode::NoError);
}

fn question_without_edns() -> Question {
    question(&query("web.", RecordType::A, None), Transport::Udp)
}

/// 29 addresses of the name `web` are 12 + 9 + 29 * 16 = 485 bytes, 31 are 517.
#[rstest::rstest]
#[case::fits_in_a_plain_datagram(None, 30, false)]
#[case::one_too_many(None, 31, true)]
#[case::edns_gives_room(Some(1232), 60, false)]
#[case::edns_room_is_honoured(Some(600), 60, true)]
#[case::edns_below_the_minimum_counts_as_it(Some(100), 29, false)]
#[case::more_room_than_a_path_takes(Some(4096), 200, true)]
fn udp_answers_fit(#[case] edns: Option<u16>, #[case] count: u16, #[case] truncated: bool) {
    let question = question(&query("web.", RecordType::A, edns), Transport::Udp);
    let bytes = question.addresses(&v4(count), None);
    let room = usize::from(edns.unwrap_or(512).clamp(512, LARGEST_UDP));
    assert!(bytes.len() <= room, "{} > {room}", bytes.len());
    let answer = Message::from_vec(&bytes).unwrap();
    assert_eq!(answer.metadata.truncation, truncated);
    let want = if truncated { 0 } else { usize::from(count) };
    assert_eq!(answer.answers.len(), want);
    assert_eq!(answer.edns.is_some(), edns.is_some());
}

#[test]
fn tcp_answers_take_what_a_message_can() {
    let question = question(&query("web.", RecordType::A, None), Transport::Tcp);
    let answer = Message::from_vec(&question.addresses(&v4(1000), None)).unwrap();
    assert_eq!(answer.answers.len(), 1000);
    let answer = Message::from_vec(&question.addresses(&v4(10_000), None)).unwrap();
    assert_eq!(answer.answers.len(), MOST_ADDRESSES);
    assert!(!answer.metadata.truncation);
}

#[test]
fn what_is_no_question_is_refused_or_ignored() {
    let mut response = query("web.", RecordType::A, None);
    response.metadata.message_type = MessageType::Response;
    for ignored in [&response.to_vec().unwrap()[..], &[0; 11], &[]] {
        assert!(matches!(read(ignored, Transport::Udp), Incoming::Ignore));
    }
    let mut update = query("web.", RecordType::A, None);
    update.metadata.op_code = OpCode::Notify;
    let answer = refused(&update.to_vec().unwrap());
    assert_eq!(answer.metadata.response_code, ResponseCode::NotImp);
    assert_eq!(answer.metadata.id, ID);

    let mut two = query("web.", RecordType::A, None);
    two.add_query(two.queries[0].clone());
    let answer = refused(&two.to_vec().unwrap());
    assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);

    let mut cut = query("web.alpha.", RecordType::A, None).to_vec().unwrap();
    cut.truncate(cut.len() - 6);
    assert_eq!(refused(&cut).metadata.response_code, ResponseCode::FormErr);

    let mut future = query("web.", RecordType::A, Some(1232));
    future.edns.as_mut().unwrap().set_version(1);
    let answer = refused(&future.to_vec().unwrap());
    // The number has two names; the other one belongs to signatures.
    let code = u16::from(answer.metadata.response_code);
    assert_eq!(code, u16::from(ResponseCode::BADVERS));
    assert_eq!(answer.edns.unwrap().version(), 0);
}

#[test]
fn names_that_are_no_hostnames_are_left_to_others() {
    let name = Name::from_labels([&b"web.alpha"[..], b"svc"]).unwrap();
    let mut message = query("web.", RecordType::A, None);
    message.queries[0].name = name;
    assert_eq!(question(&message, Transport::Udp).hostname(), None);
    let mut message = query("web.", RecordType::A, None);
    message.queries[0].query_class = DNSClass::CH;
    assert_eq!(question(&message, Transport::Udp).hostname(), None);
    let root = query(".", RecordType::NS, None);
    assert_eq!(question(&root, Transport::Udp).hostname(), None);
}

/// An answer that another question or another id belongs to is forged or late.
#[test]
fn only_the_right_answer_is_one() {
    let asked = question_without_edns();
    let answer = |name: &str, kind, change: fn(&mut Message)| {
        let mut message = query(name, kind, None);
        message.metadata.message_type = MessageType::Response;
        change(&mut message);
        asked.is_answered_by(&message.to_vec().unwrap(), ID)
    };
    assert!(answer("web.", RecordType::A, |_| {}));
    assert!(answer("WEB.", RecordType::A, |_| {}));
    assert!(!answer("web2.", RecordType::A, |_| {}));
    assert!(!answer("web.", RecordType::AAAA, |_| {}));
    assert!(!answer("web.", RecordType::A, |m| m.metadata.id ^= 1));
    assert!(!answer("web.", RecordType::A, |m| {
        m.metadata.message_type = MessageType::Query;
    }));
    assert!(!answer("web.", RecordType::A, |m| m.queries.clear()));
    assert!(answer("web.", RecordType::A, |m| {
        m.queries.clear();
        m.metadata.response_code = ResponseCode::FormErr;
    }));
}

#[test]
fn passing_on_keeps_the_clients_id_and_size() {
    let asked = question(&query("web.", RecordType::TXT, Some(600)), Transport::Udp);
    let mut nobody = query("web.", RecordType::TXT, None);
    nobody.metadata.id = 7;
    nobody.metadata.message_type = MessageType::Response;
    nobody.metadata.response_code = ResponseCode::NXDomain;
    let nobody = nobody.to_vec().unwrap();
    let passed = |exists| Message::from_vec(&asked.pass_on(nobody.clone(), exists)).unwrap();
    assert_eq!(passed(false).metadata.id, ID);
    assert_eq!(passed(false).metadata.response_code, ResponseCode::NXDomain);
    // The mesh has the name: it only has no such record.
    assert_eq!(passed(true).metadata.response_code, ResponseCode::NoError);

    let mut large = nobody;
    large.resize(601, 0);
    let answer = Message::from_vec(&asked.pass_on(large, false)).unwrap();
    assert!(answer.metadata.truncation && answer.edns.is_some());
}

proptest! {
    /// Whatever a pod or a resolver sends, it is read, answered, or ignored; and an answer fits.
    #[test]
    fn hostile_messages(bytes in prop::collection::vec(any::<u8>(), 0..600), id in any::<u16>()) {
        try_everything(&bytes, id);
    }

    /// Near to a query: a real one with some bytes changed, cut or repeated.
    #[test]
    fn damaged_queries(
        name in "[a-zA-Z*_.]{0,80}",
        kind in any::<u16>(),
        edns in prop::option::of(any::<u16>()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        end in any::<prop::sample::Index>(),
        id in any::<u16>(),
    ) {
        let Ok(name) = Name::from_ascii(name) else { return Ok(()) };
        let mut message = query("web.", kind.into(), edns);
        message.queries[0].name = name;
        let Ok(mut bytes) = message.to_vec() else { return Ok(()) };
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(end.index(bytes.len()) + 1);
        try_everything(&bytes, id);
    }
}

fn try_everything(bytes: &[u8], id: u16) {
    for transport in [Transport::Udp, Transport::Tcp] {
        if let Incoming::Question(question) = read(bytes, transport) {
            let _ = question.hostname();
            let room = usize::from(question.room());
            for answer in [
                question.addresses(&v4(100), Some("other.name")),
                question.addresses(&[], None),
                question.pass_on(bytes.to_vec(), true),
                question.error(ResponseCode::ServFail),
            ] {
                assert!(answer.len() <= room, "{} > {room}", answer.len());
            }
            let _ = question.is_answered_by(bytes, id);
        }
    }
    let _ = question_without_edns().is_answered_by(bytes, id);
}
