//! DNS messages on the wire: reading queries that anybody may have written, and writing answers of the right size.
//!
//! Only questions are read in full. What is passed on is passed on as it came.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::TTL;
use super::lookup::AddressFamily;

/// Largest answer by UDP without EDNS (RFC 1035).
const PLAIN_UDP: u16 = 512;
/// Largest answer by UDP that is given, and the size that is announced: what passes every path in one piece (the DNS
/// community's agreement of 2020).
pub const LARGEST_UDP: u16 = 1232;
/// Largest message by TCP.
pub const LARGEST_TCP: u16 = u16::MAX;
/// Addresses in one answer: as many of the longer ones (28 bytes) as fit in a message with room to spare.
const MOST_ADDRESSES: usize = 2000;
/// Fixed part of a message.
const HEADER: usize = 12;

/// How a query came, which decides how large its answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// In one datagram.
    Udp,
    /// Behind its length in a stream.
    Tcp,
}

/// What a message turned out to be.
#[derive(Debug)]
pub enum Incoming {
    /// A query.
    Question(Box<Question>),
    /// Something to be answered with an error as it stands.
    Refuse(Vec<u8>),
    /// No query at all: not answered, since an answer to an answer may be answered again.
    Ignore,
}

/// One question that can be answered or passed on.
#[derive(Debug)]
pub struct Question {
    query: Message,
    transport: Transport,
}

/// Reads a message.
pub fn read(bytes: &[u8], transport: Transport) -> Incoming {
    let Ok(header) = Header::read(&mut BinDecoder::new(bytes)) else {
        return Incoming::Ignore;
    };
    let meta = header.metadata;
    if meta.message_type != MessageType::Query {
        return Incoming::Ignore;
    }
    let error = |code| {
        let message = Message::error_msg(meta.id, meta.op_code, code);
        Incoming::Refuse(message.to_vec().unwrap_or_default())
    };
    if meta.op_code != OpCode::Query {
        return error(ResponseCode::NotImp);
    }
    let Ok(query) = Message::from_vec(bytes) else {
        return error(ResponseCode::FormErr);
    };
    if query.queries.len() != 1 {
        return error(ResponseCode::FormErr);
    }
    let question = Question { query, transport };
    if question.edns().is_some_and(|edns| edns.version() > 0) {
        return Incoming::Refuse(question.error(ResponseCode::BADVERS));
    }
    Incoming::Question(Box::new(question))
}

impl Question {
    fn asked(&self) -> &Query {
        &self.query.queries[0]
    }

    fn edns(&self) -> Option<&Edns> {
        self.query.edns.as_ref()
    }

    /// The name in lower case without the last dot, if it can be a hostname.
    pub fn hostname(&self) -> Option<String> {
        let mut text = String::new();
        for label in self.asked().name.iter() {
            let label = std::str::from_utf8(label).ok()?;
            // A dot inside a label would make another name of it.
            if !label.is_ascii() || label.contains('.') {
                return None;
            }
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(label);
        }
        text.make_ascii_lowercase();
        (!text.is_empty() && self.asked().query_class == DNSClass::IN).then_some(text)
    }

    /// The family, if addresses are asked for.
    pub fn family(&self) -> Option<AddressFamily> {
        match self.asked().query_type {
            RecordType::A => Some(AddressFamily::V4),
            RecordType::AAAA => Some(AddressFamily::V6),
            _ => None,
        }
    }

    /// The type asked for, for messages.
    pub fn record_type(&self) -> String {
        self.asked().query_type.to_string()
    }

    /// Bytes that the client can take in an answer.
    fn room(&self) -> u16 {
        match (self.transport, self.edns()) {
            (Transport::Tcp, _) => LARGEST_TCP,
            (Transport::Udp, None) => PLAIN_UDP,
            (Transport::Udp, Some(edns)) => edns.max_payload().max(PLAIN_UDP),
        }
    }

    /// An empty answer of ours to this question.
    fn reply(&self) -> Message {
        let asked = &self.query.metadata;
        let mut reply = Message::response(asked.id, asked.op_code);
        reply.metadata.recursion_desired = asked.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.checking_disabled = asked.checking_disabled;
        reply.add_query(self.asked().clone());
        if let Some(edns) = self.edns() {
            let mut own = Edns::new();
            own.set_max_payload(LARGEST_UDP);
            own.set_dnssec_ok(edns.flags().dnssec_ok);
            reply.set_edns(own);
        }
        reply
    }

    /// An error.
    pub fn error(&self, code: ResponseCode) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.response_code = code;
        // The high bits of a code are in the EDNS record; `to_vec` does not put them there.
        if let Some(edns) = reply.edns.as_mut() {
            edns.set_rcode_high(code.high());
        }
        reply.to_vec().unwrap_or_default()
    }

    /// The addresses of a name of the mesh; if it is an alias, behind the name that it is one of. When they do not fit, none
    /// of them and the flag that asks the client to come by TCP, where it gets 2000 at most.
    pub fn addresses(&self, addresses: &[IpAddr], alias_of: Option<&str>) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.authoritative = true;
        let mut owner = self.asked().name.clone();
        if let Some(alias) = alias_of.and_then(|name| Name::from_ascii(format!("{name}.")).ok())
            && !addresses.is_empty()
        {
            let rdata = RData::CNAME(CNAME(alias.clone()));
            reply.add_answer(Record::from_rdata(owner, TTL, rdata));
            owner = alias;
        }
        let room = usize::from(match self.transport {
            Transport::Udp => self.room().min(LARGEST_UDP),
            Transport::Tcp => self.room(),
        });
        reply.add_answers(addresses.iter().take(MOST_ADDRESSES).map(|ip| {
            let rdata = match ip {
                IpAddr::V4(ip) => RData::A(A(*ip)),
                IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
            };
            Record::from_rdata(owner.clone(), TTL, rdata)
        }));
        match reply.to_vec() {
            Ok(bytes) if bytes.len() <= room => bytes,
            _ => self.truncated(),
        }
    }

    fn truncated(&self) -> Vec<u8> {
        let mut reply = self.reply();
        reply.metadata.truncation = true;
        reply.to_vec().unwrap_or_default()
    }

    /// Whether a message of an upstream answers this question, which was sent to it under `id`.
    pub fn is_answered_by(&self, answer: &[u8], id: u16) -> bool {
        let mut decoder = BinDecoder::new(answer);
        let Ok(header) = Header::read(&mut decoder) else {
            return false;
        };
        if header.metadata.id != id || header.metadata.message_type != MessageType::Response {
            return false;
        }
        match header.counts.queries {
            // A server that did not understand the question may leave it out.
            0 => header.metadata.response_code != ResponseCode::NoError,
            1 => Message::read_queries(&mut decoder, 1).is_ok_and(|queries| {
                queries.first().is_some_and(|query| {
                    let asked = self.asked();
                    query.name == asked.name
                        && query.query_type == asked.query_type
                        && query.query_class == asked.query_class
                })
            }),
            _ => false,
        }
    }

    /// An upstream's answer as the client gets it: under its own id and no larger than it can take. `exists`: the mesh has
    /// this name, so it is not said that nobody has, only that it has no records of this type.
    pub fn pass_on(&self, mut answer: Vec<u8>, exists: bool) -> Vec<u8> {
        if answer.len() > usize::from(self.room()) || answer.len() < HEADER {
            return self.truncated();
        }
        answer[..2].copy_from_slice(&self.query.metadata.id.to_be_bytes());
        let code = answer[3] & 0x0f;
        if exists && code == ResponseCode::NXDomain.low() {
            answer[3] &= 0xf0;
        }
        answer
    }
}

/// A query's bytes under another id.
pub fn with_id(query: &[u8], id: u16) -> Vec<u8> {
    let mut query = query.to_vec();
    if let Some(place) = query.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    query
}

#[cfg(test)]
mod tests;
