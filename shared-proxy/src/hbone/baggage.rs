//! The `baggage` header: who an end of a connection is, for the telemetry of the other end. No decision depends on it.

use std::fmt::Write;

use crate::state::Workload;
use crate::state::workload::Locality;

/// Longest header that is read, in bytes (W3C Baggage, 3.3.2).
const LONGEST: usize = 8192;

/// Kinds of what controls a workload, of which one names it.
const KINDS: [&str; 4] = ["deployment", "cronjob", "pod", "job"];

/// The header's value for a workload. What is unknown is left out.
pub(crate) fn baggage(workload: &Workload) -> String {
    let mut text = String::with_capacity(256);
    let mut add = |key: &[&str], value: &str| {
        if value.is_empty() || !value.bytes().all(is_allowed) {
            return;
        }
        if !text.is_empty() {
            text.push(',');
        }
        for part in key {
            text.push_str(part);
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "={value}");
    };
    let kind = &*workload.workload_type;
    let kind = KINDS.into_iter().find(|known| *known == kind);
    add(&["k8s.cluster.name"], &workload.cluster_id);
    add(&["k8s.namespace.name"], &workload.namespace);
    add(
        &["k8s.", kind.unwrap_or(KINDS[0]), ".name"],
        &workload.workload_name,
    );
    add(&["service.name"], &workload.canonical_name);
    add(&["service.version"], &workload.canonical_revision);
    add(&["cloud.region"], &workload.locality.region);
    add(&["cloud.availability_zone"], &workload.locality.zone);
    text
}

/// What the other end says of itself, as a workload of `network` without an address. Unknown keys and members that are
/// malformed are passed over.
pub(crate) fn parse(header: &str, network: &str) -> Option<Workload> {
    if header.is_empty() || header.len() > LONGEST {
        return None;
    }
    let mut workload = nobody(network);
    let mut locality = Locality::default();
    let mut known = false;
    for member in header.split(',') {
        // What follows a semicolon are properties of the member.
        let member = member.split(';').next().unwrap_or_default();
        let Some((key, value)) = member.split_once('=') else {
            continue;
        };
        let (key, value) = (key.trim(), value.trim());
        if value.is_empty() || !value.bytes().all(is_allowed) {
            continue;
        }
        let field = match key {
            "k8s.cluster.name" => &mut workload.cluster_id,
            "k8s.namespace.name" => &mut workload.namespace,
            "service.name" => &mut workload.canonical_name,
            "service.version" => &mut workload.canonical_revision,
            "cloud.region" => &mut locality.region,
            "cloud.availability_zone" => &mut locality.zone,
            _ => {
                let kind = key
                    .strip_prefix("k8s.")
                    .and_then(|key| key.strip_suffix(".name"));
                let Some(kind) = KINDS.into_iter().find(|known| kind == Some(known)) else {
                    continue;
                };
                workload.workload_type = kind.into();
                workload.name = value.into();
                &mut workload.workload_name
            }
        };
        *field = value.into();
        known = true;
    }
    workload.locality = locality;
    known.then_some(workload)
}

/// A workload of `network` of which nothing else is known.
pub(crate) fn nobody(network: &str) -> Workload {
    Workload {
        namespace: "".into(),
        cluster_id: "".into(),
        network: network.into(),
        ..Workload::default()
    }
}

/// Characters of a value (W3C Baggage, 3.3.1.3): printable ASCII without white space, quotes, comma, semicolon, backslash.
fn is_allowed(c: u8) -> bool {
    c.is_ascii_graphic() && !matches!(c, b'"' | b',' | b';' | b'\\')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    fn workload(kind: &str) -> Workload {
        Workload {
            name: "web".into(),
            namespace: "shop".into(),
            cluster_id: "east".into(),
            workload_name: "web".into(),
            workload_type: kind.into(),
            canonical_name: "web-app".into(),
            canonical_revision: "v2".into(),
            locality: Locality {
                region: "r1".into(),
                zone: "z1".into(),
                subzone: "".into(),
            },
            ..Workload::default()
        }
    }

    #[rstest::rstest]
    #[case("deployment")]
    #[case("cronjob")]
    #[case("pod")]
    #[case("job")]
    fn names_its_keys(#[case] kind: &str) {
        let text = baggage(&workload(kind));
        let expected = format!(
            "k8s.cluster.name=east,k8s.namespace.name=shop,k8s.{kind}.name=web,service.name=web-app,\
             service.version=v2,cloud.region=r1,cloud.availability_zone=z1"
        );
        assert_eq!(text, expected);
        let back = parse(&text, "net").unwrap();
        let expected = Workload {
            network: "net".into(),
            ..workload(kind)
        };
        assert_eq!(back, expected);
    }

    #[test]
    fn what_is_unknown_or_cannot_be_written_is_left_out() {
        let odd = Workload {
            cluster_id: "a,b=c".into(),
            namespace: "shop".into(),
            ..Workload::default()
        };
        assert_eq!(baggage(&odd), "k8s.namespace.name=shop");
    }

    #[rstest::rstest]
    #[case::empty("")]
    #[case::no_member("hello")]
    #[case::unknown_keys("a=b,c=d")]
    #[case::empty_value("service.name=")]
    #[case::bad_value("service.name=a b")]
    fn nothing_of_use(#[case] text: &str) {
        assert_eq!(parse(text, ""), None);
    }

    #[test]
    fn spaces_and_properties_do_not_count() {
        let parsed = parse(" service.name = web ; ttl=1 , x=y", "").unwrap();
        assert_eq!(&*parsed.canonical_name, "web");
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,80}(,k8s\\.[a-z]{0,4}\\.name=\\PC{0,8})*") {
            let _ = parse(&text, "n");
        }
    }
}
