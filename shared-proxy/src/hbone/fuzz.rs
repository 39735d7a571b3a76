//! What a peer writes into a CONNECT: millions of times, see the crate `fuzz-driver`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use bytes::Bytes;
use fuzz_driver::{Target, Verdict};
use http::{HeaderName, HeaderValue, Method, Request, Uri};

use super::authority::Authority;
use super::{baggage, server};

const NETWORK: &str = "here";
const BAGGAGE: &str = "k8s.cluster.name=east,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web-app,\
     service.version=v2,cloud.region=r1,cloud.availability_zone=z1";

#[test]
fn authority() {
    let seeds = [
        "10.0.0.1:80",
        "[fd00::1]:15008",
        "[::ffff:10.0.0.1]:443",
        "[fe80::1%3]:80",
        "web.default.svc.cluster.local:8080",
        "A_b-c.example:65535",
    ];
    let words: &[&[u8]] = &[b":", b"[", b"]", b".", b"@", b"::", b":65536", b"%"];
    Target::new("authority", seeds).words(words).run(|input| {
        let Ok(text) = std::str::from_utf8(input) else {
            return Verdict::refused("not UTF-8");
        };
        match text.parse::<Authority>() {
            Err(error) => Verdict::refused(error),
            Ok(authority) => {
                let written = authority.to_string();
                assert_eq!(written.parse::<Authority>().as_ref(), Ok(&authority));
                // A port is never made up.
                let digits = text.rsplit(':').next().unwrap();
                assert_eq!(digits.parse(), Ok(authority.port()));
                match authority {
                    Authority::Address(_) => Verdict::Taken("address"),
                    Authority::Hostname(name, _) => {
                        assert!(name.len() <= 253 && !name.contains(char::is_whitespace));
                        Verdict::Taken("hostname")
                    }
                }
            }
        }
    });
}

#[test]
fn baggage() {
    let seeds = [
        BAGGAGE,
        "k8s.pod.name=a;ttl=1 , k8s.job.name=b",
        "x=y,service.name=a=b",
        " cloud.region = r ",
    ];
    let words: &[&[u8]] = &[
        b"k8s.cronjob.name=",
        b"k8s.",
        b".name",
        b",",
        b";",
        b"=",
        b"service.name=",
        b"cloud.region=",
    ];
    Target::new("baggage", seeds).words(words).run(|input| {
        let Ok(text) = std::str::from_utf8(input) else {
            return Verdict::refused("not UTF-8");
        };
        let Some(workload) = baggage::parse(text, NETWORK) else {
            return Verdict::refused("nothing in it that is known");
        };
        let written = baggage::baggage(&workload);
        assert!(written.len() <= text.len());
        assert!(HeaderValue::try_from(&*written).is_ok());
        assert_eq!(baggage::parse(&written, NETWORK), Some(workload));
        Verdict::Taken("workload")
    });
}

/// Headers as lines: what HTTP/2 lets pass of them, the server is asked about.
fn request(input: &[u8]) -> Result<Request<()>, String> {
    let mut lines = input.split(|byte| *byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let at = first.iter().position(|byte| *byte == b' ');
    let (method, authority) = first.split_at(at.ok_or("no method")?);
    let authority = Bytes::copy_from_slice(&authority[1..]);
    let authority = http::uri::Authority::from_maybe_shared(authority)
        .map_err(|_| "no authority to HTTP/2".to_owned())?;
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(method).map_err(|_| "no method to HTTP/2")?;
    *request.uri_mut() = Uri::from(authority);
    for line in lines {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let (name, value) = (parts.next().unwrap(), parts.next().unwrap_or_default());
        let name = HeaderName::from_bytes(name).map_err(|_| "no name to HTTP/2")?;
        let value = HeaderValue::from_bytes(value).map_err(|_| "no value to HTTP/2")?;
        request.headers_mut().append(name, value);
    }
    Ok(request)
}

#[test]
fn connect_headers() {
    let seeds = [
        "CONNECT 10.0.0.1:80".to_owned(),
        format!(
            "CONNECT web.a.svc:80\nforwarded:for=\"10.0.0.1:5\";host=web.a.svc\nbaggage:{BAGGAGE}"
        ),
        format!(
            "CONNECT [fd00::1]:80\nx-forwarded-network:there\nbaggage:{BAGGAGE}\ntraceparent:00-1-2-00"
        ),
        "GET web.a.svc:80\nforwarded:for=x, Host = y ; host=\"z\"".to_owned(),
    ];
    let words: &[&[u8]] = &[
        b"CONNECT ",
        b"\nforwarded:",
        b"\nbaggage:",
        b"\nx-forwarded-network:",
        b"host=",
        b";",
        b"\"",
        b"\xff",
        b"\t",
    ];
    let target = Target::new("connect-headers", seeds.map(String::into_bytes)).words(words);
    target.run(|input| {
        let request = match request(input) {
            Ok(request) => request,
            Err(error) => return Verdict::refused(error),
        };
        let claims = server::claims(NETWORK, request.headers());
        if let Some(service) = &claims.service {
            let header = request.headers()["forwarded"].to_str().unwrap();
            assert!(header.contains(service.as_str()));
        }
        if let Some(source) = &claims.foreign_source {
            assert_eq!(*source.network, request.headers()["x-forwarded-network"]);
            assert_ne!(*source.network, *NETWORK);
            assert!(source.addresses.is_empty(), "nobody says where he is");
        }
        match server::authority(&request) {
            Err(error) => Verdict::refused(error),
            Ok(_) if request.method() != Method::CONNECT => panic!("not a CONNECT"),
            Ok(_) => Verdict::Taken(match (claims.service, claims.foreign_source) {
                (None, None) => "plain",
                (Some(_), None) => "service",
                (None, Some(_)) => "foreign",
                (Some(_), Some(_)) => "both",
            }),
        }
    });
}
