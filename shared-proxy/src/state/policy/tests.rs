#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

const ALICE: &str = "spiffe://cluster.local/ns/shop/sa/alice";

fn workload() -> Workload {
    Workload {
        uid: "w".into(),
        name: "api".into(),
        namespace: "shop".into(),
        authorization_policies: vec!["ops/selected".into(), "ops/missing".into()],
        ..Workload::default()
    }
}

/// A verdict on a connection of `identity` from 10.0.0.1 to 10.0.0.2:8080, as text.
fn verdict(policies: &str, identity: Option<&str>) -> String {
    let policies: Vec<Policy> = serde_saphyr::from_str(policies).unwrap();
    let snapshot = Snapshot::new(vec![workload()], vec![], policies).unwrap();
    let identity: Option<Identity> = identity.map(|text| text.parse().unwrap());
    let peer = Peer {
        identity: identity.as_ref(),
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2:8080".parse().unwrap(),
    };
    authorize(&snapshot, &workload(), &peer).to_string()
}

fn policy(name: &str, scope: &str, action: &str, rules: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "- {{namespace: {namespace}, name: {name}, scope: {scope}, action: {action}, dryRun: false, rules: {rules}}}\n"
    )
}

/// Whether a policy with these rules matches, seen through its effect.
fn matches(rules: &str, identity: Option<&str>) -> bool {
    let allowed = verdict(&policy("shop/p", "Namespace", "Allow", rules), identity);
    let denied = verdict(&policy("shop/p", "Namespace", "Deny", rules), identity);
    match (&*allowed, &*denied) {
        ("allowed", "denied by policy shop/p") => true,
        ("no ALLOW policy matches", "allowed") => false,
        other => panic!("ALLOW and DENY disagree about {rules}: {other:?}"),
    }
}

const YES: &str = "{destinationPorts: [8080]}";
const NO: &str = "{destinationPorts: [1]}";
const NONE: &str = "{}";

#[rstest::rstest]
#[case::no_rules("[]".into(), false)]
#[case::rule_without_clauses("[[]]".into(), true)]
#[case::clause_without_matches("[[[]]]".into(), true)]
#[case::match_without_fields(format!("[[[{NONE}]]]"), false)]
#[case::match_without_fields_beside_one_that_holds(format!("[[[{NONE}, {YES}]]]"), true)]
#[case::match_without_fields_in_one_of_two_clauses(format!("[[[{NONE}], [{YES}]]]"), false)]
#[case::empty_clause_beside_one_that_fails(format!("[[[], [{NO}]]]"), false)]
#[case::rules_are_alternatives(format!("[[[{NO}]], [[{YES}]]]"), true)]
#[case::no_rule_holds(format!("[[[{NO}]], [[{NO}]]]"), false)]
#[case::clauses_must_all_hold(format!("[[[{YES}], [{NO}]]]"), false)]
#[case::clauses_all_hold(format!("[[[{YES}], [{YES}]]]"), true)]
#[case::matches_are_alternatives(format!("[[[{NO}, {YES}]]]"), true)]
#[case::no_match_holds(format!("[[[{NO}, {NO}]]]"), false)]
fn structure(#[case] rules: String, #[case] expected: bool) {
    assert_eq!(matches(&rules, Some(ALICE)), expected, "{rules}");
}

#[rstest::rstest]
// Namespaces.
#[case("namespaces: [{Exact: shop}]", true)]
#[case("namespaces: [{Exact: other}]", false)]
#[case("namespaces: [{Exact: other}, {Prefix: sh}]", true)]
#[case("namespaces: [{Suffix: op}]", true)]
#[case("namespaces: [{Suffix: sh}]", false)]
#[case("namespaces: [{Presence: []}]", true)]
#[case("notNamespaces: [{Exact: shop}]", false)]
#[case("notNamespaces: [{Exact: other}]", true)]
#[case("notNamespaces: [{Exact: other}, {Exact: shop}]", false)]
// Principals: without the scheme.
#[case("principals: [{Exact: cluster.local/ns/shop/sa/alice}]", true)]
#[case(
    "principals: [{Exact: 'spiffe://cluster.local/ns/shop/sa/alice'}]",
    false
)]
#[case("principals: [{Prefix: cluster.local/ns/shop/}]", true)]
#[case("principals: [{Prefix: 'spiffe://'}]", false)]
#[case("principals: [{Suffix: /sa/alice}]", true)]
#[case("principals: [{Suffix: /sa/bob}]", false)]
#[case("principals: [{Presence: []}]", true)]
#[case("notPrincipals: [{Presence: []}]", false)]
#[case("notPrincipals: [{Exact: cluster.local/ns/shop/sa/bob}]", true)]
// Service accounts.
#[case("serviceAccounts: [{namespace: shop, serviceAccount: alice}]", true)]
#[case("serviceAccounts: [{namespace: shop, serviceAccount: bob}]", false)]
#[case("serviceAccounts: [{namespace: other, serviceAccount: alice}]", false)]
#[case(
    "notServiceAccounts: [{namespace: shop, serviceAccount: alice}]",
    false
)]
#[case("notServiceAccounts: [{namespace: shop, serviceAccount: bob}]", true)]
// Addresses and ports.
#[case("sourceIps: [10.0.0.0/24]", true)]
#[case("sourceIps: [10.0.0.1]", true)]
#[case("sourceIps: [10.0.0.2/32]", false)]
#[case("sourceIps: ['::/0']", false)]
#[case("notSourceIps: [10.0.0.0/8]", false)]
#[case("notSourceIps: [192.168.0.0/16]", true)]
#[case("destinationIps: [10.0.0.2]", true)]
#[case("destinationIps: [10.0.0.1]", false)]
#[case("notDestinationIps: [10.0.0.2]", false)]
#[case("notDestinationIps: [10.0.0.1]", true)]
#[case("destinationPorts: [80, 8080]", true)]
#[case("destinationPorts: [80]", false)]
#[case("notDestinationPorts: [8080]", false)]
#[case("notDestinationPorts: [80]", true)]
// All fields of a match must hold.
#[case("namespaces: [{Exact: shop}], destinationPorts: [8080]", true)]
#[case("namespaces: [{Exact: shop}], destinationPorts: [80]", false)]
#[case("namespaces: [{Exact: shop}], notSourceIps: [10.0.0.1]", false)]
#[case("destinationPorts: [8080], notDestinationPorts: [8080]", false)]
fn fields_with_an_identity(#[case] fields: &str, #[case] expected: bool) {
    assert_eq!(
        matches(&format!("[[[{{{fields}}}]]]"), Some(ALICE)),
        expected
    );
}

#[rstest::rstest]
#[case("namespaces: [{Exact: shop}]", false)]
#[case("namespaces: [{Presence: []}]", false)]
#[case("namespaces: [{Prefix: ''}]", true)]
#[case("notNamespaces: [{Exact: shop}]", true)]
#[case("notNamespaces: [{Presence: []}]", true)]
#[case("principals: [{Presence: []}]", false)]
#[case("principals: [{Prefix: ''}]", false)]
#[case("notPrincipals: [{Presence: []}]", true)]
#[case("serviceAccounts: [{namespace: '', serviceAccount: ''}]", false)]
#[case("notServiceAccounts: [{namespace: shop, serviceAccount: alice}]", true)]
#[case("sourceIps: [10.0.0.1]", true)]
fn fields_without_an_identity(#[case] fields: &str, #[case] expected: bool) {
    assert_eq!(matches(&format!("[[[{{{fields}}}]]]"), None), expected);
}

#[test]
fn no_policy_allows() {
    assert_eq!(verdict("[]", Some(ALICE)), "allowed");
    assert_eq!(verdict("[]", None), "allowed");
}

#[test]
fn a_deny_policy_wins_over_an_allow_policy_whatever_their_order() {
    let allow = policy("shop/a", "Namespace", "Allow", "[[]]");
    let deny = policy("shop/d", "Namespace", "Deny", "[[]]");
    for policies in [format!("{allow}{deny}"), format!("{deny}{allow}")] {
        assert_eq!(verdict(&policies, Some(ALICE)), "denied by policy shop/d");
    }
}

#[test]
fn a_deny_policy_that_does_not_match_allows() {
    let deny = policy("shop/d", "Namespace", "Deny", &format!("[[[{NO}]]]"));
    assert_eq!(verdict(&deny, Some(ALICE)), "allowed");
}

#[test]
fn one_of_several_allow_policies_suffices() {
    let no = policy("shop/no", "Namespace", "Allow", &format!("[[[{NO}]]]"));
    let yes = policy("shop/yes", "Namespace", "Allow", &format!("[[[{YES}]]]"));
    assert_eq!(verdict(&no, Some(ALICE)), "no ALLOW policy matches");
    assert_eq!(verdict(&format!("{no}{yes}"), Some(ALICE)), "allowed");
}

#[rstest::rstest]
#[case::global_of_any_namespace("ops/p", "Global", true)]
#[case::own_namespace("shop/p", "Namespace", true)]
#[case::other_namespace("ops/p", "Namespace", false)]
#[case::selected("ops/selected", "WorkloadSelector", true)]
#[case::not_selected("shop/p", "WorkloadSelector", false)]
fn scopes(#[case] name: &str, #[case] scope: &str, #[case] applies: bool) {
    let denied = verdict(&policy(name, scope, "Deny", "[[]]"), Some(ALICE));
    assert_eq!(denied != "allowed", applies, "{denied}");
}

#[test]
fn a_policy_that_is_named_and_applies_anyway_counts_once() {
    let policies: Vec<Policy> =
        serde_saphyr::from_str(&policy("ops/selected", "Global", "Deny", "[[]]")).unwrap();
    let snapshot = Snapshot::new(vec![], vec![], policies).unwrap();
    assert_eq!(snapshot.policies_for(&workload()).count(), 1);
}

#[rstest::rstest]
#[case::deny("Deny")]
#[case::allow_does_not_close_the_rest("Allow")]
fn a_dry_run_changes_nothing(#[case] action: &str) {
    let rules = if action == "Deny" { "[[]]" } else { "[]" };
    let real = policy("shop/p", "Namespace", action, rules);
    assert_ne!(verdict(&real, Some(ALICE)), "allowed");
    let dry = real.replace("dryRun: false", "dryRun: true");
    assert_eq!(verdict(&dry, Some(ALICE)), "allowed");
}

#[test]
fn strict_mode_closes_plaintext_only() {
    let strict = policy(
        "ops/selected",
        "WorkloadSelector",
        "Deny",
        "[[[{notPrincipals: [{Presence: []}]}]]]",
    );
    assert_eq!(verdict(&strict, None), "denied by policy ops/selected");
    assert_eq!(verdict(&strict, Some(ALICE)), "allowed");
}
