//! The semantics of authorization, sentence by sentence.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

const ALICE: &str = "spiffe://cluster.local/ns/shop/sa/alice";

/// A policy `NAMESPACE/NAME SCOPE ACTION RULES`.
fn policy(text: &str) -> Policy {
    let parts: Vec<&str> = text.splitn(4, ' ').collect();
    let [name, scope, action, rules] = parts[..] else {
        panic!("{text}");
    };
    let (dry_run, action) = match action.strip_prefix("Dry") {
        Some(action) => (true, action),
        None => (false, action),
    };
    let (namespace, name) = name.split_once('/').unwrap();
    serde_saphyr::from_str(&format!(
        "{{namespace: {namespace}, name: {name}, scope: {scope}, action: {action}, dryRun: {dry_run}, rules: {rules}}}"
    ))
    .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The verdict on a connection of `identity` from 10.0.0.1 to 10.0.0.2:8080, which is in namespace `shop` and names the
/// policies `ops/selected` and `ops/missing`.
fn verdict(policies: &[&str], identity: Option<&str>) -> String {
    let workload = Workload {
        uid: "w".into(),
        namespace: "shop".into(),
        authorization_policies: vec!["ops/missing".into(), "ops/selected".into()],
        ..Workload::default()
    };
    let policies = policies.iter().map(|text| policy(text)).collect();
    let snapshot = Snapshot::new(vec![workload.clone()], vec![], policies).unwrap();
    let identity: Option<Identity> = identity.map(|text| text.parse().unwrap());
    let peer = Peer {
        identity: identity.as_ref(),
        source: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.2:8080".parse().unwrap(),
    };
    authorize(&snapshot, &workload, &peer).to_string()
}

#[rstest::rstest]
// 1. Policies that apply.
#[case::step_1_global_applies(&["ops/p Global Deny [[]]"], "denied by policy ops/p")]
#[case::step_1_namespace_of_the_workload_applies(&["shop/p Namespace Deny [[]]"], "denied by policy shop/p")]
#[case::step_1_namespace_of_another_does_not(&["ops/p Namespace Deny [[]]"], "allowed")]
#[case::step_1_named_by_the_workload_applies(&["ops/selected WorkloadSelector Deny [[]]"], "denied by policy ops/selected")]
#[case::step_1_selector_of_others_does_not(&["shop/p WorkloadSelector Deny [[]]"], "allowed")]
#[case::step_1_a_missing_policy_does_not_deny(&[], "allowed")]
// 2. dry_run policies only log.
#[case::step_2_dry_run_deny_only_logs(&["shop/p Namespace DryDeny [[]]"], "allowed")]
#[case::step_2_dry_run_allow_only_logs(&["shop/p Namespace DryAllow []"], "allowed")]
#[case::step_2_dry_run_allow_does_not_let_pass(&["shop/p Namespace DryAllow [[]]", "shop/q Namespace Allow []"], "no ALLOW policy matches")]
// 3. Any DENY policy matches.
#[case::step_3_any_deny_matches(&["shop/p Namespace Deny []", "shop/q Namespace Deny [[]]"], "denied by policy shop/q")]
#[case::step_3_deny_wins_over_allow(&["shop/a Namespace Allow [[]]", "shop/p Namespace Deny [[]]"], "denied by policy shop/p")]
// 4. No ALLOW policy at all.
#[case::step_4_no_allow_policy_at_all(&["shop/p Namespace Deny []"], "allowed")]
#[case::step_4_an_allow_policy_for_others_is_none(&["ops/p Namespace Allow []"], "allowed")]
// 5. Any ALLOW policy matches.
#[case::step_5_any_allow_matches(&["shop/p Namespace Allow []", "shop/q Namespace Allow [[]]"], "allowed")]
// 6. Otherwise deny.
#[case::step_6_otherwise_deny(&["shop/p Namespace Allow []"], "no ALLOW policy matches")]
// STRICT.
#[case::strict_lets_an_identity_pass(&["ops/selected WorkloadSelector Deny [[[{notPrincipals: [{Presence: []}]}]]]"], "allowed")]
fn decision(#[case] policies: &[&str], #[case] expected: &str) {
    assert_eq!(verdict(policies, Some(ALICE)), expected);
}

#[rstest::rstest]
#[case::strict_denies_empty_principals(&["ops/selected WorkloadSelector Deny [[[{notPrincipals: [{Presence: []}]}]]]"], "denied by policy ops/selected")]
#[case::identity_is_the_empty_string(&["shop/p Namespace Deny [[[{notPrincipals: [{Exact: cluster.local/ns/shop/sa/alice}]}]]]"], "denied by policy shop/p")]
#[case::namespace_is_the_empty_string(&["shop/p Namespace Deny [[[{notNamespaces: [{Exact: shop}]}]]]"], "denied by policy shop/p")]
fn without_a_peer_identity(#[case] policies: &[&str], #[case] expected: &str) {
    assert_eq!(verdict(policies, None), expected);
}

/// Structure and emptiness, as `RULES` of a policy that denies if it matches.
#[rstest::rstest]
#[case::rules_are_or("[[[{YES}]], [[{NO}]]]", true)]
#[case::clauses_are_and("[[[{YES}], [{NO}]]]", false)]
#[case::matches_are_or("[[[{YES}, {NO}]]]", true)]
#[case::fields_are_and("[[[{YES, NO}]]]", false)]
#[case::values_of_a_field_are_or("[[[{destinationPorts: [1, 8080]}]]]", true)]
#[case::not_is_none_of_the_values("[[[{notDestinationPorts: [1, 8080]}]]]", false)]
#[case::no_rules_never_match("[]", false)]
#[case::a_rule_without_clauses_matches("[[]]", true)]
#[case::a_clause_without_matches_is_true("[[[]]]", true)]
#[case::a_match_without_fields_is_skipped("[[[{}]]]", false)]
#[case::a_match_without_fields_beside_another("[[[{}, {YES}]]]", true)]
#[case::principals_are_without_the_scheme("[[[{principals: [{Prefix: 'spiffe://'}]}]]]", false)]
#[case::principals_exact("[[[{principals: [{Exact: cluster.local/ns/shop/sa/alice}]}]]]", true)]
#[case::principals_prefix("[[[{principals: [{Prefix: cluster.local/ns/shop/}]}]]]", true)]
#[case::principals_suffix("[[[{principals: [{Suffix: /sa/alice}]}]]]", true)]
#[case::principals_presence("[[[{principals: [{Presence: []}]}]]]", true)]
#[case::not_principals("[[[{notPrincipals: [{Suffix: /sa/alice}]}]]]", false)]
#[case::namespaces("[[[{namespaces: [{Exact: shop}]}]]]", true)]
#[case::not_namespaces("[[[{notNamespaces: [{Exact: shop}]}]]]", false)]
#[case::source_ips("[[[{sourceIps: [10.0.0.0/30]}]]]", true)]
#[case::not_source_ips("[[[{notSourceIps: [10.0.0.0/30]}]]]", false)]
#[case::destination_ips("[[[{destinationIps: [10.0.0.2/32]}]]]", true)]
#[case::not_destination_ips("[[[{notDestinationIps: [10.0.0.2/32]}]]]", false)]
#[case::destination_ports("[[[{destinationPorts: [8080]}]]]", true)]
#[case::not_destination_ports("[[[{notDestinationPorts: [8080]}]]]", false)]
#[case::service_accounts(
    "[[[{serviceAccounts: [{namespace: shop, serviceAccount: alice}]}]]]",
    true
)]
#[case::service_accounts_of_another_namespace(
    "[[[{serviceAccounts: [{namespace: ops, serviceAccount: alice}]}]]]",
    false
)]
#[case::not_service_accounts(
    "[[[{notServiceAccounts: [{namespace: shop, serviceAccount: alice}]}]]]",
    false
)]
fn matches(#[case] rules: &str, #[case] expected: bool) {
    let rules = rules
        .replace("YES", "destinationPorts: [8080]")
        .replace("NO", "sourceIps: [192.0.2.1]");
    let denied = verdict(&[&format!("shop/p Namespace Deny {rules}")], Some(ALICE));
    assert_eq!(
        denied == "denied by policy shop/p",
        expected,
        "{rules}: {denied}"
    );
    let allowed = verdict(&[&format!("shop/p Namespace Allow {rules}")], Some(ALICE));
    assert_eq!(allowed == "allowed", expected, "{rules}: {allowed}");
}
