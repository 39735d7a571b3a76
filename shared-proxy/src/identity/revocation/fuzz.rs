//! A file of revocation lists that anybody may have written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use fuzz_driver::{Target, Verdict};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{Error, KeyUsage};

use super::lists::Lists;

/// What revoked the certificate `leaf.pem` in the name of `root.pem`, what did not, and somebody else's list.
const REVOKING: [&[u8]; 2] = [
    include_bytes!("fuzz/one.pem"),
    include_bytes!("fuzz/many.pem"),
];
const OTHERS: [&[u8]; 2] = [
    include_bytes!("fuzz/empty.pem"),
    include_bytes!("fuzz/other.pem"),
];
/// January 2027, when all of them are in force: one input is one result, whenever it is fed.
const NOW: Duration = Duration::from_secs(1_800_000_000);

fn der(pem: &[u8]) -> Vec<u8> {
    CertificateRevocationListDer::from_pem_slice(pem)
        .unwrap()
        .to_vec()
}

/// Whether one of the lists in an input is one that the issuer has signed, byte by byte.
fn is_genuine(input: &[u8], revoking: &[Vec<u8>]) -> bool {
    let known = |list: &[u8]| revoking.iter().any(|genuine| genuine == list);
    known(input)
        || CertificateRevocationListDer::pem_slice_iter(input)
            .flatten()
            .any(|list| known(&list))
}

#[test]
fn revocation_lists() {
    let certificate = |pem: &[u8]| CertificateDer::from_pem_slice(pem).unwrap();
    let chain = [certificate(include_bytes!("fuzz/leaf.pem"))];
    let mut roots = RootCertStore::empty();
    roots
        .add(certificate(include_bytes!("fuzz/root.pem")))
        .unwrap();
    let revoking = REVOKING.map(der);
    let check = |lists: &Lists| {
        let now = UnixTime::since_unix_epoch(NOW);
        lists.check(&chain, &roots, now, KeyUsage::client_auth())
    };
    for (lists, revokes) in [(REVOKING, true), (OTHERS, false)] {
        for pem in lists {
            let lists = Lists::parse(pem).unwrap();
            assert_eq!(check(&lists) == Err(Error::CertRevoked), revokes);
        }
    }

    let pem = [&REVOKING[..], &OTHERS[..]].concat();
    let all = pem.concat();
    let seeds = pem.iter().map(|pem| der(pem));
    let seeds = seeds.chain(pem.iter().map(|pem| pem.to_vec())).chain([all]);
    let words: &[&[u8]] = &[
        b"-----BEGIN X509 CRL-----\n",
        b"-----END X509 CRL-----\n",
        b"-----BEGIN CERTIFICATE-----\n",
        b"\x30\x82",
        b"\x30\x80",
        b"\xa0\x03\x02\x01\x01",
        b"\x17\x0d",
        b"\x18\x0f",
        b"\x06\x03\x55\x1d\x15",
        b"\x06\x03\x55\x1d\x1c",
        b"\x0a\x01\x08",
        b"\x01\x01\xff",
    ];
    Target::new("revocation-lists", seeds)
        .words(words)
        .run(|input| {
            let lists = match Lists::parse(input) {
                Ok(lists) => lists,
                Err(error) => return Verdict::refused(error),
            };
            assert_eq!(
                lists.revoked(),
                Lists::parse(input).unwrap().revoked(),
                "the same twice"
            );
            assert!(!lists.is_empty() || lists.revoked() == 0);
            match check(&lists) {
                Ok(()) if lists.is_empty() => Verdict::Taken("no list"),
                Ok(()) => Verdict::Taken("revokes nobody here"),
                Err(Error::CertRevoked) => {
                    // Whoever has not the issuer's key revokes nobody.
                    assert!(is_genuine(input, &revoking));
                    Verdict::Taken("revokes")
                }
                Err(_) => Verdict::Taken("names the certificate and is not to be relied on"),
            }
        });
}
