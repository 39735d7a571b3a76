//! Policies. Nothing in them is guessed: a policy that is not wholly understood is not used.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use shared_proxy::state::Policy;
use shared_proxy::state::policy::{Action, Match, PolicyScope, ServiceAccountMatch, StringMatch};

use super::{Texts, Unusable, ip, ip_bytes, port, value};
use crate::messages::authorization as wire;

pub(super) fn from_wire(
    message: wire::Authorization,
    texts: &mut Texts,
) -> Result<Policy, Unusable> {
    if message.name.is_empty() {
        return Err(Unusable::Missing("name"));
    }
    let scope = match wire::Scope::try_from(message.scope) {
        Ok(wire::Scope::Global) => PolicyScope::Global,
        Ok(wire::Scope::Namespace) => PolicyScope::Namespace,
        Ok(wire::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
        Err(_) => return Err(value("scope", format_args!("{}, unknown", message.scope))),
    };
    let action = match wire::Action::try_from(message.action) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Err(_) => return Err(value("action", format_args!("{}, unknown", message.action))),
    };
    let mut rules = Vec::with_capacity(message.rules.len());
    for rule in message.rules {
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for clause in rule.clauses {
            let matches = clause.matches.into_iter();
            let matches = matches.map(|item| match_from_wire(item, action));
            clauses.push(matches.collect::<Result<_, _>>()?);
        }
        rules.push(clauses);
    }
    Ok(Policy {
        name: message.name.as_str().into(),
        namespace: texts.get(&message.namespace),
        scope,
        action,
        rules,
        dry_run: message.dry_run,
    })
}

/// A condition of a kind that is not known here may hold or not: it lets nobody pass, and it keeps nobody from being
/// denied by what else the match says.
fn match_from_wire(message: wire::Match, action: Action) -> Result<Match, Unusable> {
    let unknown = message.extensions.first().map(|known| known.name.clone());
    let known = known_conditions(message)?;
    let Some(unknown) = unknown else {
        return Ok(known);
    };
    tracing::warn!(
        extension = unknown,
        ?action,
        "a policy has a condition that is not known here"
    );
    Ok(match action {
        // Without conditions a match is false.
        Action::Allow => Match::default(),
        Action::Deny if known == Match::default() => Match {
            source_ips: vec![
                IpNet::from(Ipv4Net::default()),
                IpNet::from(Ipv6Net::default()),
            ],
            ..known
        },
        Action::Deny => known,
    })
}

fn known_conditions(message: wire::Match) -> Result<Match, Unusable> {
    Ok(Match {
        namespaces: strings(message.namespaces)?,
        not_namespaces: strings(message.not_namespaces)?,
        principals: strings(message.principals)?,
        not_principals: strings(message.not_principals)?,
        service_accounts: accounts(message.service_accounts),
        not_service_accounts: accounts(message.not_service_accounts),
        source_ips: networks("source_ips", &message.source_ips)?,
        not_source_ips: networks("not_source_ips", &message.not_source_ips)?,
        destination_ips: networks("destination_ips", &message.destination_ips)?,
        not_destination_ips: networks("not_destination_ips", &message.not_destination_ips)?,
        destination_ports: ports("destination_ports", &message.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &message.not_destination_ports)?,
    })
}

fn strings(list: Vec<wire::StringMatch>) -> Result<Vec<StringMatch>, Unusable> {
    list.into_iter()
        .map(|item| {
            Ok(match item.match_type {
                Some(wire::MatchType::Exact(text)) => StringMatch::Exact(text.into()),
                Some(wire::MatchType::Prefix(text)) => StringMatch::Prefix(text.into()),
                Some(wire::MatchType::Suffix(text)) => StringMatch::Suffix(text.into()),
                Some(wire::MatchType::Presence(())) => StringMatch::Presence(),
                None => {
                    return Err(Unusable::Missing(
                        "match_type (or it is of an unknown kind)",
                    ));
                }
            })
        })
        .collect()
}

fn accounts(list: Vec<wire::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
    list.into_iter()
        .map(|item| ServiceAccountMatch {
            namespace: item.namespace.into(),
            service_account: item.service_account.into(),
        })
        .collect()
}

fn networks(field: &'static str, list: &[wire::Network]) -> Result<Vec<IpNet>, Unusable> {
    list.iter()
        .map(|item| {
            let ip = ip(field, &item.address)?;
            u8::try_from(item.length)
                .ok()
                .and_then(|length| IpNet::new(ip, length).ok())
                .ok_or_else(|| value(field, format_args!("{ip}/{}, too long", item.length)))
        })
        .collect()
}

fn ports(field: &'static str, list: &[u32]) -> Result<Vec<u16>, Unusable> {
    list.iter().map(|item| port(field, *item)).collect()
}

pub(super) fn to_wire(policy: &Policy) -> wire::Authorization {
    let clause = |clause: &Vec<Match>| wire::Clause {
        matches: clause.iter().map(match_to_wire).collect(),
    };
    wire::Authorization {
        name: policy.name.to_string(),
        namespace: policy.namespace.to_string(),
        scope: match policy.scope {
            PolicyScope::Global => wire::Scope::Global,
            PolicyScope::Namespace => wire::Scope::Namespace,
            PolicyScope::WorkloadSelector => wire::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            Action::Allow => wire::Action::Allow,
            Action::Deny => wire::Action::Deny,
        }
        .into(),
        rules: policy
            .rules
            .iter()
            .map(|rule| wire::Rule {
                clauses: rule.iter().map(clause).collect(),
            })
            .collect(),
        dry_run: policy.dry_run,
    }
}

fn match_to_wire(item: &Match) -> wire::Match {
    wire::Match {
        namespaces: wire_strings(&item.namespaces),
        not_namespaces: wire_strings(&item.not_namespaces),
        principals: wire_strings(&item.principals),
        not_principals: wire_strings(&item.not_principals),
        source_ips: wire_networks(&item.source_ips),
        not_source_ips: wire_networks(&item.not_source_ips),
        destination_ips: wire_networks(&item.destination_ips),
        not_destination_ips: wire_networks(&item.not_destination_ips),
        destination_ports: wire_ports(&item.destination_ports),
        not_destination_ports: wire_ports(&item.not_destination_ports),
        service_accounts: wire_accounts(&item.service_accounts),
        not_service_accounts: wire_accounts(&item.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn wire_strings(list: &[StringMatch]) -> Vec<wire::StringMatch> {
    let kind = |item: &StringMatch| match item {
        StringMatch::Exact(text) => wire::MatchType::Exact(text.to_string()),
        StringMatch::Prefix(text) => wire::MatchType::Prefix(text.to_string()),
        StringMatch::Suffix(text) => wire::MatchType::Suffix(text.to_string()),
        StringMatch::Presence() => wire::MatchType::Presence(()),
    };
    list.iter()
        .map(|item| wire::StringMatch {
            match_type: Some(kind(item)),
        })
        .collect()
}

fn wire_networks(list: &[IpNet]) -> Vec<wire::Network> {
    list.iter()
        .map(|network| wire::Network {
            address: ip_bytes(network.addr()),
            length: u32::from(network.prefix_len()),
        })
        .collect()
}

fn wire_ports(list: &[u16]) -> Vec<u32> {
    list.iter().map(|port| u32::from(*port)).collect()
}

fn wire_accounts(list: &[ServiceAccountMatch]) -> Vec<wire::ServiceAccountMatch> {
    list.iter()
        .map(|item| wire::ServiceAccountMatch {
            namespace: item.namespace.to_string(),
            service_account: item.service_account.to_string(),
        })
        .collect()
}
