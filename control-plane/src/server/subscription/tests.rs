#![allow(clippy::unwrap_used, clippy::expect_used)]

use shared_proxy::state::{Snapshot, local_xds};

use super::*;
use crate::messages::discovery::Status;
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const ONE: &str =
    "- {uid: one, namespace: a, workloadIps: [10.0.0.1], services: {a/web: {80: 80}}}\n";
const TWO: &str = "- {uid: two, namespace: a, workloadIps: [10.0.0.2], services: {}}\n";
const TWO_MOVED: &str = "- {uid: two, namespace: a, workloadIps: [10.0.0.22], services: {}}\n";
const WEB: &str =
    "services:\n- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1], ports: {80: 80}}\n";

fn mesh(workloads: &[&str]) -> Snapshot {
    let text = format!("workloads:\n{}{WEB}", workloads.concat());
    local_xds::parse(&text).unwrap()
}

/// A client, and the server's catalogue as it was when it heard last.
struct Client {
    subscription: Subscription,
    catalogue: Catalogue,
    nonces: u32,
}

/// Names that were sent, and names that were removed.
type Said = Option<(Vec<String>, Vec<String>)>;

fn said(sent: &[&str], removed: &[&str]) -> Said {
    let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    Some((list(sent), list(removed)))
}

impl Client {
    fn new() -> Self {
        Self {
            subscription: Subscription::new(ADDRESS_TYPE),
            catalogue: Catalogue::default(),
            nonces: 0,
        }
    }

    fn asks(&mut self, subscribe: &[&str], unsubscribe: &[&str], held: &[(&str, &str)]) {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        self.subscription.request(DeltaDiscoveryRequest {
            resource_names_subscribe: list(subscribe),
            resource_names_unsubscribe: list(unsubscribe),
            initial_resource_versions: held
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    /// Another mesh is published, and the client told what there is to tell.
    fn hears(&mut self, mesh: &Snapshot) -> Said {
        self.catalogue = self.catalogue.replaced(mesh.clone());
        let response = self.subscription.next(&self.catalogue, || {
            self.nonces += 1;
            self.nonces.to_string()
        })?;
        assert_eq!(response.nonce, self.nonces.to_string());
        let sent = response.resources.into_iter().map(|r| r.name).collect();
        Some((sent, response.removed_resources))
    }

    fn answers(&mut self, nonce: u32, error: Option<&str>) -> Reply {
        self.subscription.request(DeltaDiscoveryRequest {
            response_nonce: nonce.to_string(),
            error_detail: error.map(|message| Status {
                code: 3,
                message: message.to_owned(),
            }),
            ..DeltaDiscoveryRequest::default()
        })
    }
}

#[test]
fn a_wildcard_gets_all_then_only_what_changes() {
    let mut client = Client::new();
    let both = mesh(&[ONE, TWO]);
    assert_eq!(client.hears(&both), None, "before the client has asked");
    client.asks(&[], &[], &[]);
    assert_eq!(client.hears(&both), said(&["a/web", "one", "two"], &[]));
    client.answers(1, None);
    assert_eq!(client.hears(&both), None);
    assert_eq!(client.hears(&mesh(&[ONE, TWO_MOVED])), said(&["two"], &[]));
    client.answers(2, None);
    assert_eq!(client.hears(&mesh(&[TWO_MOVED])), said(&[], &["one"]));
    client.answers(3, None);
    assert_eq!(client.hears(&mesh(&[ONE, TWO])), said(&["one", "two"], &[]));
}

#[test]
fn nothing_is_sent_before_the_last_response_is_answered() {
    let mut client = Client::new();
    client.asks(&[], &[], &[]);
    client.hears(&mesh(&[ONE, TWO]));
    assert_eq!(client.hears(&mesh(&[TWO_MOVED])), None);
    assert_eq!(client.answers(7, None), Reply::None, "an unknown nonce");
    assert_eq!(client.hears(&mesh(&[TWO_MOVED])), None);
    assert_eq!(client.answers(1, None), Reply::Ack);
    assert_eq!(client.hears(&mesh(&[TWO_MOVED])), said(&["two"], &["one"]));
    assert_eq!(client.answers(1, None), Reply::None, "an old nonce");
}

#[test]
fn what_was_refused_is_not_sent_again_unless_it_changes() {
    let mut client = Client::new();
    client.asks(&[], &[], &[]);
    client.hears(&mesh(&[ONE, TWO]));
    assert_eq!(
        client.answers(1, Some("two: bad")),
        Reply::Nack("two: bad".to_owned())
    );
    assert_eq!(client.hears(&mesh(&[ONE, TWO])), None);
    assert_eq!(client.hears(&mesh(&[ONE, TWO_MOVED])), said(&["two"], &[]));
}

#[test]
fn a_client_that_comes_back_gets_the_differences() {
    let both = mesh(&[ONE, TWO]);
    let catalogue = Catalogue::new(both.clone());
    let version = |name: &str| {
        catalogue
            .resources(ADDRESS_TYPE)
            .unwrap()
            .get(name)
            .unwrap()
            .version
            .to_string()
    };
    let mut client = Client::new();
    client.asks(
        &[],
        &[],
        &[
            ("a/web", &version("a/web")),
            ("one", &version("one")),
            ("two", "older"),
            ("gone", "1"),
        ],
    );
    assert_eq!(client.hears(&both), said(&["two"], &["gone"]));
    // With nothing to say, the first answer is empty: the client waits for one.
    let mut client = Client::new();
    client.asks(
        &[],
        &[],
        &[
            ("a/web", &version("a/web")),
            ("one", &version("one")),
            ("two", &version("two")),
        ],
    );
    assert_eq!(client.hears(&both), said(&[], &[]));
    client.answers(1, None);
    assert_eq!(client.hears(&both), None);
}

#[test]
fn on_demand_gets_what_it_asks_for_by_any_name_and_hears_of_what_is_not_there() {
    let both = mesh(&[ONE, TWO]);
    let mut client = Client::new();
    client.asks(&["*"], &["*"], &[]);
    assert_eq!(client.hears(&both), None);
    client.asks(&["/10.0.0.2"], &[], &[]);
    assert_eq!(client.hears(&both), said(&["two"], &[]));
    client.answers(1, None);
    // A service comes with its endpoints.
    client.asks(&["/10.1.0.1", "/10.9.9.9"], &[], &[]);
    assert_eq!(client.hears(&both), said(&["a/web", "one"], &["/10.9.9.9"]));
    client.answers(2, None);
    assert_eq!(client.hears(&both), None);
    // Asked again, it is answered again.
    client.asks(&["two", "a/web"], &[], &[]);
    assert_eq!(client.hears(&both), said(&["a/web", "one", "two"], &[]));
    client.answers(3, None);
    assert_eq!(client.hears(&mesh(&[ONE, TWO_MOVED])), said(&["two"], &[]));
    client.answers(4, None);
    // A resource that is no longer followed is not a resource that is gone.
    client.asks(&[], &["/10.1.0.1", "a/web"], &[]);
    assert_eq!(client.hears(&mesh(&[ONE, TWO_MOVED])), None);
    assert_eq!(client.hears(&mesh(&[TWO_MOVED])), None);
    assert_eq!(client.hears(&mesh(&[])), said(&[], &["two"]));
}

#[test]
fn policies_are_their_own_type() {
    let text = "policies: [{name: p, namespace: a, scope: Namespace, action: Deny, dryRun: false, rules: []}]";
    let catalogue = Catalogue::new(local_xds::parse(text).unwrap());
    let mut subscription = Subscription::new(AUTHORIZATION_TYPE);
    subscription.request(DeltaDiscoveryRequest::default());
    let response = subscription.next(&catalogue, || "1".to_owned()).unwrap();
    assert_eq!(response.resources[0].name, "a/p");
    assert_eq!(response.type_url, AUTHORIZATION_TYPE);
}

/// Whatever is published in whichever order, and however seldom the client listens: what it holds in the end is the mesh.
#[test]
fn a_client_that_listens_now_and_then_holds_the_mesh() {
    let resources: Vec<String> = (1..6)
        .map(|n| format!("- {{uid: w{n}, namespace: a, workloadIps: [10.0.0.{n}], services: {{}}, capacity: CAP}}\n"))
        .collect();
    let mut random = 7_u32;
    let mut next = |below: u32| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 16) % below
    };
    let mut client = Client::new();
    client.asks(&[], &[], &[]);
    let mut held: std::collections::BTreeMap<String, Vec<u8>> = Default::default();
    let mut nonces = 0;
    for _ in 0..500 {
        let mut present = Vec::new();
        for text in &resources {
            if next(3) > 0 {
                present.push(text.replace("CAP", &(1 + next(2)).to_string()));
            }
        }
        let present: Vec<&str> = present.iter().map(String::as_str).collect();
        client.catalogue = client.catalogue.replaced(mesh(&present));
        if next(3) > 0 {
            continue;
        }
        let response = client.subscription.next(&client.catalogue, || {
            nonces += 1;
            nonces.to_string()
        });
        if let Some(response) = response {
            for resource in response.resources {
                held.insert(resource.name, resource.resource.unwrap().value.to_vec());
            }
            for name in response.removed_resources {
                assert!(held.remove(&name).is_some(), "{name} was not held");
            }
            client.answers(nonces, None);
        }
        let wanted: std::collections::BTreeMap<String, Vec<u8>> = client
            .catalogue
            .resources(ADDRESS_TYPE)
            .unwrap()
            .iter()
            .map(|(name, resource)| {
                let message = resource.message(name, ADDRESS_TYPE);
                (name.to_string(), message.resource.unwrap().value.to_vec())
            })
            .collect();
        assert_eq!(held, wanted);
    }
    assert!(nonces > 50);
}

/// Only the resources that a change is about are made again.
#[test]
fn what_does_not_change_is_not_encoded_again() {
    let before = Catalogue::new(mesh(&[ONE, TWO]));
    let after = before.replaced(mesh(&[ONE, TWO_MOVED]));
    let place = |catalogue: &Catalogue, name: &str| {
        let resources = catalogue.resources(ADDRESS_TYPE).unwrap();
        let message = resources.get(name).unwrap().message(name, ADDRESS_TYPE);
        message.resource.unwrap().value.as_ptr()
    };
    assert_eq!(place(&before, "one"), place(&after, "one"));
    assert_ne!(place(&before, "two"), place(&after, "two"));
    let changed = after
        .changed_since(before.revision(), ADDRESS_TYPE)
        .unwrap();
    assert_eq!(
        changed.iter().map(|name| &**name).collect::<Vec<_>>(),
        ["two"]
    );
    // Who has missed more than is remembered goes through all.
    assert_eq!(
        Catalogue::new(mesh(&[])).changed_since(7, ADDRESS_TYPE),
        None
    );
}
