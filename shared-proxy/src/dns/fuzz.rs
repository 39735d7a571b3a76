//! Datagrams of pods, and of whoever answers in a resolver's name.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fuzz_driver::{Random, Target, Verdict};
use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};

use super::message::{Incoming, LARGEST_TCP, LARGEST_UDP, Question, Transport, read};
use super::names::{meanings, with_wildcards};

const ID: u16 = 0x1234;
/// Labels with their lengths, pointers, types: pieces of messages.
const WORDS: [&[u8]; 12] = [
    b"\x03web",
    b"\x05alpha\x03svc",
    b"\x07cluster\x05local\x00",
    b"\xc0\x0c",
    b"\xc0\x00",
    b"\xff\xff",
    b"\x00\x01\x00\x01",
    b"\x00\x1c\x00\x01",
    b"\x00\x00\x29\x04\xd0\x00\x00\x80\x00\x00\x00",
    b"\x3f",
    b"\x40",
    b"\x01*",
];

fn message(name: &str, kind: RecordType, edns: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.id = ID;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(true);
        message.set_edns(edns);
    }
    message
}

/// Any name of any type.
fn make(random: &mut Random) -> Vec<u8> {
    let mut name = String::new();
    for _ in 0..random.below(12) {
        let length = 1 + random.below(12);
        name.extend((0..length).map(|_| *random.one_of(&['a', 'Z', '0', '-', '_', '*'])));
        name.push('.');
    }
    let kind = RecordType::from(*random.one_of(&[1, 2, 5, 12, 15, 16, 28, 33, 64, 65, 255, 256]));
    let edns = random
        .one_in(2)
        .then(|| *random.one_of(&[0, 511, 512, 1232, 4096, 65535]));
    match Name::from_ascii(if name.is_empty() { "." } else { &name }) {
        Ok(_) => message(&name, kind, edns).to_vec().unwrap(),
        Err(_) => Vec::new(),
    }
}

fn room(query: &Message, transport: Transport) -> usize {
    let udp = query
        .edns
        .as_ref()
        .map_or(512, |edns| edns.max_payload().max(512));
    usize::from(match transport {
        Transport::Tcp => LARGEST_TCP,
        Transport::Udp => udp,
    })
}

/// An answer of ours: to this question, and of a size that the client can take.
fn is_reply(answer: &[u8], question: &[u8], room: usize) -> Message {
    assert!(answer.len() <= room, "{} > {room}", answer.len());
    assert_eq!(answer[..2], question[..2], "the id");
    let answer = Message::from_vec(answer).unwrap();
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    answer
}

#[test]
fn dns_queries() {
    let seeds = [
        message("web.alpha.svc.cluster.local.", RecordType::A, Some(1232)),
        message("WEB.alpha.", RecordType::AAAA, None),
        message("*.x.", RecordType::TXT, Some(65535)),
        message(".", RecordType::NS, None),
    ];
    let addresses: Vec<IpAddr> = (0..200)
        .map(|n| match n % 2 {
            0 => Ipv4Addr::from(0x0a00_0000 + n).into(),
            _ => Ipv6Addr::from(u128::from(n)).into(),
        })
        .collect();
    let target = Target::new("dns-queries", seeds.map(|seed| seed.to_vec().unwrap()));
    let mut turn = 0_usize;
    target.words(&WORDS).maker(make).run(|input| {
        turn += 1;
        let transport = [Transport::Udp, Transport::Tcp][turn % 2];
        let question = match read(input, transport) {
            Incoming::Ignore => return Verdict::refused("not a query"),
            Incoming::Refuse(answer) => {
                let answer = is_reply(&answer, input, 512);
                assert_ne!(answer.metadata.response_code, ResponseCode::NoError);
                return Verdict::refused(answer.metadata.response_code);
            }
            Incoming::Question(question) => question,
        };
        let room = room(&Message::from_vec(input).unwrap(), transport);
        let some = &addresses[..turn % addresses.len()];
        is_reply(&question.addresses(some, Some("other.name")), input, room);
        is_reply(&question.error(ResponseCode::ServFail), input, room);
        let Some(hostname) = question.hostname() else {
            return Verdict::Taken("a name that is no hostname");
        };
        for meaning in meanings(&hostname, "alpha", "cluster.local") {
            let widest = with_wildcards(&meaning.name).last().unwrap();
            assert!(widest == meaning.name || widest.starts_with("*."));
        }
        Verdict::Taken(match question.family() {
            Some(_) => "an address of a hostname",
            None => "something else of a hostname",
        })
    });
}

#[test]
fn dns_answers() {
    let question = |edns, transport| {
        let query = message("web.alpha.", RecordType::A, edns);
        match read(&query.to_vec().unwrap(), transport) {
            Incoming::Question(question) => (*question, room(&query, transport)),
            other => panic!("{other:?}"),
        }
    };
    let questions: [(Question, usize); 3] = [
        question(None, Transport::Udp),
        question(Some(LARGEST_UDP), Transport::Udp),
        question(None, Transport::Tcp),
    ];
    let mut answer = message("web.alpha.", RecordType::A, Some(1232));
    answer.metadata.message_type = MessageType::Response;
    let (name, rdata) = (
        answer.queries[0].name.clone(),
        RData::A(A(Ipv4Addr::LOCALHOST)),
    );
    answer.add_answer(Record::from_rdata(name, 30, rdata));
    let mut nobody = answer.clone();
    nobody.metadata.response_code = ResponseCode::NXDomain;
    let mut lost = answer.clone();
    lost.metadata.response_code = ResponseCode::FormErr;
    lost.queries.clear();
    let mut long = answer.clone();
    for _ in 0..40 {
        long.add_answer(long.answers[0].clone());
    }
    let seeds = [answer, nobody, lost, long].map(|seed| seed.to_vec().unwrap());
    Target::new("dns-answers", seeds)
        .words(&WORDS)
        .run(|input| {
            let right = questions[0].0.is_answered_by(input, ID);
            for (question, room) in &questions {
                assert_eq!(question.is_answered_by(input, ID), right);
                assert!(!question.is_answered_by(input, ID ^ 1) || !right);
                for exists in [false, true] {
                    let passed = question.pass_on(input.to_vec(), exists);
                    assert!(passed.len() <= *room, "{} > {room}", passed.len());
                    assert_eq!(passed[..2], ID.to_be_bytes());
                    if right && exists {
                        assert_ne!(passed[3] & 0x0f, ResponseCode::NXDomain.low());
                    }
                }
            }
            if right {
                Verdict::Taken("an answer")
            } else {
                Verdict::refused("no answer to this")
            }
        });
}
