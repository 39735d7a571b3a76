//! A second, naive reading of the rules, over the policies' JSON form, against which random policies are run.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::Value;

use super::*;

/// Everything that a condition can ask for, as text.
struct Facts {
    principal: Option<String>,
    namespace: String,
    account: Option<(String, String)>,
    source: IpAddr,
    destination: SocketAddr,
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn text_fits(pattern: &Value, text: &str) -> bool {
    let (kind, operand) = pattern.as_object().unwrap().iter().next().unwrap();
    let operand = operand.as_str().unwrap_or("");
    match kind.as_str() {
        "Exact" => operand == text,
        "Prefix" => text.get(..operand.len()) == Some(operand),
        "Suffix" => text.len() >= operand.len() && &text[text.len() - operand.len()..] == operand,
        "Presence" => !text.is_empty(),
        other => panic!("{other}"),
    }
}

fn value_fits(field: &str, value: &Value, facts: &Facts) -> bool {
    let net = || value.as_str().unwrap().parse::<IpNet>().unwrap();
    match field {
        "namespaces" => text_fits(value, &facts.namespace),
        "principals" => match &facts.principal {
            Some(principal) => text_fits(value, principal),
            None => false,
        },
        "serviceAccounts" => {
            let wanted = (&value["namespace"], &value["serviceAccount"]);
            facts
                .account
                .as_ref()
                .is_some_and(|(ns, sa)| wanted == (&Value::from(&**ns), &Value::from(&**sa)))
        }
        "sourceIps" => net().contains(&facts.source),
        "destinationIps" => net().contains(&facts.destination.ip()),
        "destinationPorts" => value.as_u64() == Some(u64::from(facts.destination.port())),
        other => panic!("{other}"),
    }
}

fn match_holds(conditions: &Value, facts: &Facts) -> bool {
    let conditions = conditions.as_object().unwrap();
    if conditions.is_empty() {
        return false;
    }
    for (field, values) in conditions {
        let (field, wanted) = match field.strip_prefix("not") {
            Some(rest) => (rest[..1].to_lowercase() + &rest[1..], false),
            None => (field.clone(), true),
        };
        let any = list(values).iter().any(|v| value_fits(&field, v, facts));
        if any != wanted {
            return false;
        }
    }
    true
}

fn policy_matches(policy: &Value, facts: &Facts) -> bool {
    for rule in list(&policy["rules"]) {
        let mut all = true;
        for clause in list(&rule) {
            let alternatives = list(&clause);
            all &= alternatives.is_empty() || alternatives.iter().any(|m| match_holds(m, facts));
        }
        if all {
            return true;
        }
    }
    false
}

fn allowed(policies: &Value, workload: &Workload, facts: &Facts) -> bool {
    let (mut deny, mut allow, mut allows) = (false, false, 0);
    for policy in list(policies) {
        let name = format!(
            "{}/{}",
            policy["namespace"].as_str().unwrap(),
            policy["name"].as_str().unwrap()
        );
        let listed = workload.authorization_policies.contains(&name.into());
        let applies = listed
            || policy["scope"] == "Global"
            || (policy["scope"] == "Namespace" && policy["namespace"] == *workload.namespace);
        if !applies || policy["dryRun"] == true {
            continue;
        }
        let hit = policy_matches(&policy, facts);
        if policy["action"] == "Deny" {
            deny |= hit;
        } else {
            allows += 1;
            allow |= hit;
        }
    }
    !deny && (allows == 0 || allow)
}

const NAMES: [&str; 3] = ["a", "b", "ab"];

fn text_match() -> impl Strategy<Value = StringMatch> {
    let texts = select(vec!["", "a", "b", "td/ns/a/sa/b", "td/", "/sa/b", "/sa/ab"]);
    (0..4, texts).prop_map(|(kind, text)| match kind {
        0 => StringMatch::Exact(text.into()),
        1 => StringMatch::Prefix(text.into()),
        2 => StringMatch::Suffix(text.into()),
        _ => StringMatch::Presence(),
    })
}

fn account_match() -> impl Strategy<Value = ServiceAccountMatch> {
    (select(&NAMES[..]), select(&NAMES[..])).prop_map(|(namespace, account)| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: account.into(),
    })
}

fn net() -> impl Strategy<Value = IpNet> {
    select(vec![
        "10.0.0.0/31",
        "10.0.0.1/32",
        "0.0.0.0/0",
        "fd00::/64",
        "10.0.0.2/31",
    ])
    .prop_map(|text| text.parse().unwrap())
}

/// Mostly empty, so that matches hold now and then.
fn sparse<S: Strategy + 'static>(values: S) -> impl Strategy<Value = Vec<S::Value>>
where
    S::Value: Clone,
{
    prop_oneof![4 => Just(vec![]), 1 => vec(values, 1..3)]
}

fn any_match() -> impl Strategy<Value = Match> {
    let port = || select(vec![80_u16, 8080]);
    let texts = (
        sparse(text_match()),
        sparse(text_match()),
        sparse(text_match()),
        sparse(text_match()),
    );
    let accounts = (sparse(account_match()), sparse(account_match()));
    let nets = (sparse(net()), sparse(net()), sparse(net()), sparse(net()));
    (texts, accounts, nets, (sparse(port()), sparse(port()))).prop_map(|(t, a, n, p)| Match {
        namespaces: t.0,
        not_namespaces: t.1,
        principals: t.2,
        not_principals: t.3,
        service_accounts: a.0,
        not_service_accounts: a.1,
        source_ips: n.0,
        not_source_ips: n.1,
        destination_ips: n.2,
        not_destination_ips: n.3,
        destination_ports: p.0,
        not_destination_ports: p.1,
    })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        select(&NAMES[..]),
        select(vec![
            PolicyScope::Global,
            PolicyScope::Namespace,
            PolicyScope::WorkloadSelector,
        ]),
        any::<bool>(),
        prop::bool::weighted(0.15),
        vec(vec(vec(any_match(), 0..3), 0..3), 0..3),
    )
        .prop_map(|(namespace, scope, deny, dry_run, rules)| Policy {
            name: "".into(),
            namespace: namespace.into(),
            scope,
            action: if deny { Action::Deny } else { Action::Allow },
            rules,
            dry_run,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn agrees_with_the_oracle(
        policies in vec(any_policy(), 0..4),
        selected in vec(0_usize..5, 0..3),
        identity in option::weighted(0.8, (select(&NAMES[..]), select(&NAMES[..]))),
        source in select(vec!["10.0.0.1", "10.0.0.2", "fd00::1"]),
        destination in select(vec!["10.0.0.3:80", "10.0.0.1:8080", "[fd00::2]:80"]),
    ) {
        let policies: Vec<Policy> = policies
            .into_iter()
            .enumerate()
            .map(|(n, policy)| Policy { name: format!("p{n}").into(), ..policy })
            .collect();
        let workload = Workload {
            namespace: "a".into(),
            authorization_policies: selected
                .into_iter()
                .map(|n| policies.get(n).map_or("no/such".into(), |p| p.key().into()))
                .collect(),
            ..Workload::default()
        };
        let identity = identity.map(|(ns, sa)| Identity::new("td", ns, sa).unwrap());
        let peer = Peer {
            identity: identity.as_ref(),
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        let facts = Facts {
            principal: identity.as_ref().map(|i| i.to_string()["spiffe://".len()..].to_owned()),
            namespace: identity.as_ref().map_or(String::new(), |i| i.namespace().to_string()),
            account: identity.as_ref().map(|i| (i.namespace().to_string(), i.service_account().to_string())),
            source: peer.source,
            destination: peer.destination,
        };
        let json = serde_json::to_value(&policies).unwrap();
        let want = allowed(&json, &workload, &facts);
        let back: Vec<Policy> = serde_json::from_str(&json.to_string()).unwrap();
        prop_assert_eq!(&back, &policies);
        let snapshot = Snapshot::new(vec![], vec![], policies).unwrap();
        prop_assert_eq!(authorize(&snapshot, &workload, &peer).is_allowed(), want);
    }
}
