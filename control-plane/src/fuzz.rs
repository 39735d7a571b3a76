//! What a control plane and a CA may send.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::SocketAddr;

use fuzz_driver::{Target, Verdict};
use prost::Message;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair, PKCS_ED25519, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use shared_proxy::identity::{Identity, WorkloadCertificate};
use shared_proxy::state::policy::{Action, Peer};
use shared_proxy::state::{Policy, Snapshot, Workload, authorize};

use crate::ca::chain_and_roots;
use crate::convert::{self, Object, Texts};
use crate::messages::certificate::CreateCertificateResponse;
use crate::messages::tests::{WORKLOAD, address_of_workload, hex};

/// Tags of the fields of our messages, and numbers behind them.
const WORDS: [&[u8]; 14] = [
    b"\x0a",
    b"\x12",
    b"\x1a",
    b"\x22\x00",
    b"\x2a",
    b"\x30\x01",
    b"\x0a\x04\x0a\x00\x00\x01",
    b"\x20\x01",
    b"\x18\x02",
    b"\xb2\x01",
    b"\xff\xff\x03",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x0b",
    b"\x82\x01\x01/",
];

/// The object from its message, after which it has one form only.
fn settled(read: Result<Object, convert::Unusable>) -> Result<Object, Verdict> {
    let object = read.map_err(Verdict::refused)?;
    let written = object.encode();
    let again = match &object {
        Object::Policy(_) => convert::policy(written.clone().into(), &mut Texts::default()),
        _ => convert::address(written.clone().into(), &mut Texts::default()),
    };
    let again = again.unwrap();
    assert_eq!(again, object);
    assert_eq!(again.encode(), written);
    Ok(object)
}

#[test]
fn addresses() {
    let service = "0a 01 73 12 01 6e 1a 03 732e6e 22 0a 0a 02 6e31 12 04 0a010001 2a 05 08 50 10 90 3f 32 03 732f31
         3a 06 0a 04 0a 00 12 00 42 08 0a 02 06 01 10 02 18 01 48 03 58 01 60 01 6a 06 0a 02 18 01 10 07 70 01";
    let mut service = hex(service);
    let mut whole = vec![0x12, u8::try_from(service.len()).unwrap()];
    whole.append(&mut service);
    let least = address_of_workload(&["12 01 6e", "a2 01 01 75"]);
    let seeds = [address_of_workload(&WORKLOAD), least, whole];
    Target::new("xds-addresses", seeds)
        .words(&WORDS)
        .run(|input| {
            let read = convert::address(input.to_vec().into(), &mut Texts::default());
            match settled(read) {
                Err(refused) => refused,
                Ok(Object::Workload(workload)) => {
                    workload.identity().unwrap();
                    Verdict::Taken("workload")
                }
                Ok(_) => Verdict::Taken("service"),
            }
        });
}

fn peers() -> Vec<(Option<Identity>, SocketAddr, SocketAddr)> {
    let known = |text: &str| Some(text.parse().unwrap());
    let at = |text: &str| text.parse().unwrap();
    vec![
        (None, at("10.0.0.1:1"), at("10.0.0.1:80")),
        (
            known("spiffe://td/ns/a/sa/b"),
            at("10.0.0.1:1"),
            at("10.9.9.9:443"),
        ),
        (
            known("spiffe://td/ns/n/sa/s"),
            at("[fd00::1]:1"),
            at("[fd00::2]:80"),
        ),
    ]
}

#[test]
fn policies() {
    let full = hex("0a 01 70 12 01 6e 18 02 20 01 2a 3a 0a 38 12 36 0a 03 0a 01 61 12 03 12 01 62 1a 03 1a 01 63
         22 02 22 00 2a 08 0a 04 0a000000 10 08 42 08 0a 04 0a000001 10 20 4a 01 50 52 02 bb 03 62 06 0a 01 6e 12 01 73 30 01");
    let seeds = [
        full,
        // ALLOW with a rule that is empty, and one that names a port.
        hex("0a 01 70 12 01 6e 18 02 2a 00"),
        hex("0a 01 70 12 01 6e 18 02 2a 07 0a 05 12 03 4a 01 50"),
        hex("0a 01 70 12 01 6e 18 02 2a 0b 0a 09 12 07 0a 05 0a 03 612f62"),
        hex("0a 01 70 12 01 6e 18 02 2a 0e 0a 0c 12 0a 2a 08 0a 04 0a000000 10 08"),
        hex("0a 01 70 12 01 6e 18 02 2a 0c 0a 0a 12 08 5a 06 0a 01 6e 12 01 73"),
    ];
    let peers = peers();
    Target::new("policies", seeds).words(&WORDS).run(|input| {
        let read = convert::policy(input.to_vec().into(), &mut Texts::default());
        let policy = match settled(read) {
            Err(refused) => return refused,
            Ok(Object::Policy(policy)) => policy,
            Ok(other) => panic!("{other:?}"),
        };
        let verdicts = |action, dry_run| {
            let policy = Policy {
                action,
                dry_run,
                ..(*policy).clone()
            };
            let workload = Workload {
                uid: "w".into(),
                namespace: policy.namespace.clone(),
                authorization_policies: vec![policy.key().into()],
                ..Workload::default()
            };
            let snapshot = Snapshot::new(vec![workload.clone()], Vec::new(), vec![policy]).unwrap();
            let allowed =
                |(identity, source, destination): &(Option<Identity>, SocketAddr, SocketAddr)| {
                    let peer = Peer {
                        identity: identity.as_ref(),
                        source: source.ip(),
                        destination: *destination,
                    };
                    authorize(&snapshot, &workload, &peer).is_allowed()
                };
            peers.iter().map(allowed).collect::<Vec<bool>>()
        };
        let (allow, deny) = (
            verdicts(Action::Allow, false),
            verdicts(Action::Deny, false),
        );
        // Whom a rule lets pass, the same rule can refuse; and a dry run does neither.
        assert!(allow.iter().zip(&deny).all(|(allow, deny)| allow != deny));
        assert!(verdicts(policy.action, true).iter().all(|allowed| *allowed));
        Verdict::Taken(match allow.iter().filter(|allowed| **allowed).count() {
            0 => "nobody",
            1 => "one",
            2 => "two",
            _ => "all",
        })
    });
}

const IDENTITY: &str = "spiffe://td/ns/a/sa/b";

/// A key that is the same in every run, so that a seed is a sequence: Ed25519 in PKCS #8, whose signatures are as predictable.
fn key(byte: u8) -> (KeyPair, PrivateKeyDer<'static>) {
    let mut der = hex("302e020100300506032b657004220420");
    der.extend([byte; 32]);
    let der = PrivatePkcs8KeyDer::from(der);
    let pair = KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519).unwrap();
    (pair, der.into())
}

fn root(byte: u8) -> (Certificate, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pair = key(byte).0;
    let root = params.self_signed(&pair).unwrap();
    (root, Issuer::new(params, pair))
}

#[test]
fn csr_answers() {
    let ((first, issuer), (second, _)) = (root(1), root(2));
    let (pair, private) = key(3);
    let leaf = |name: &str| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(name.try_into().unwrap())];
        params.signed_by(&pair, &issuer).unwrap().pem()
    };
    let (right, wrong) = (leaf(IDENTITY), leaf("spiffe://td/ns/a/sa/c"));
    let (first, second) = (first.pem(), second.pem());
    let seeds = [
        vec![right.clone(), first.clone()],
        vec![right.clone() + &first],
        vec![right.clone(), second.clone(), first.clone() + &second],
        vec![wrong, first.clone()],
        vec![right],
    ];
    let seeds = seeds.map(|cert_chain| CreateCertificateResponse { cert_chain }.encode_to_vec());
    let words: &[&[u8]] = &[
        b"-----BEGIN CERTIFICATE-----\n",
        b"-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\n",
        b"\n",
        b"=",
        b"MII",
        b"\x0a\x00",
        b"\x0a",
        b"AAAA",
        b"////",
    ];
    let identity: Identity = IDENTITY.parse().unwrap();
    Target::new("csr-answers", seeds).words(words).run(|input| {
        let response = match CreateCertificateResponse::decode(input) {
            Ok(response) => response,
            Err(error) => return Verdict::refused(error),
        };
        let (chain, roots) = match chain_and_roots(&response) {
            Ok(both) => both,
            Err(error) => return Verdict::refused(error),
        };
        assert!(!chain.is_empty() && !roots.is_empty());
        match WorkloadCertificate::new(identity.clone(), chain, private.clone_key(), roots) {
            Err(error) => Verdict::refused(error),
            Ok(certificate) => {
                assert_eq!(certificate.identity(), &identity);
                assert!(
                    certificate.valid_from() <= certificate.expires() || certificate.is_expired()
                );
                certificate.server_config();
                certificate.client_config(&[]);
                Verdict::Taken(if certificate.chain().len() == 1 {
                    "leaf"
                } else {
                    "chain"
                })
            }
        }
    });
}
