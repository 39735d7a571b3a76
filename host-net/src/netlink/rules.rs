//! Policy routing rules.

use std::fmt;
use std::io;

use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{
    RuleAction as KernelAction, RuleAttribute, RuleFlags, RuleMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ENOENT};

use super::{Made, Netlink, NetlinkError, Presence, ROUTE_PROTOCOL};
use crate::plan::{Family, MarkMatch, Rule, RuleAction};

/// `RT_TABLE_COMPAT`: the number in the header's 8 bits when the table's does not fit.
const TABLE_COMPAT: u8 = 252;

/// A rule as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRule {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The same in a plan's words; none when the rule has properties that a plan cannot express.
    pub rule: Option<Rule>,
    /// Who made it: 0 unknown (`ip rule` sets none), 2 kernel, [`ROUTE_PROTOCOL`] this program.
    pub protocol: u8,
    shape: Shape,
}

/// All that distinguishes two rules, in comparable form.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    priority: u32,
    mark: Option<MarkMatch>,
    action: Action,
    /// Selectors and properties that no plan has, spelled as `ip rule` does where it is known.
    extras: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Known(RuleAction),
    Other(String),
}

impl Shape {
    fn of_plan(rule: &Rule) -> Self {
        Self {
            priority: rule.priority,
            mark: rule.fwmark,
            action: Action::Known(rule.action),
            extras: Vec::new(),
        }
    }

    fn of_message(message: &RuleMessage) -> (Self, u8) {
        let header = &message.header;
        let mut priority = 0;
        let mut table = u32::from(header.table);
        let (mut value, mut mask, mut target) = (0, 0, None);
        let mut protocol = 0;
        let mut extras = Vec::new();
        if header.flags.contains(RuleFlags::Invert) {
            extras.push("not".to_owned());
        }
        if header.tos != 0 {
            extras.push(format!("tos {:#x}", header.tos));
        }
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(n) => priority = *n,
                RuleAttribute::Table(n) => table = *n,
                RuleAttribute::FwMark(n) => value = *n,
                RuleAttribute::FwMask(n) => mask = *n,
                RuleAttribute::Goto(n) => target = Some(*n),
                RuleAttribute::Protocol(p) => protocol = u8::from(*p),
                // The kernel's way of saying that nothing is suppressed.
                RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
                RuleAttribute::Source(ip) => extras.push(format!("from {ip}/{}", header.src_len)),
                RuleAttribute::Destination(ip) => {
                    extras.push(format!("to {ip}/{}", header.dst_len));
                }
                RuleAttribute::Iifname(name) => extras.push(format!("iif {name}")),
                RuleAttribute::Oifname(name) => extras.push(format!("oif {name}")),
                RuleAttribute::L3MDev(true) => extras.push("l3mdev".to_owned()),
                other => extras.push(format!("{other:?}")),
            }
        }
        let action = match (header.action, target) {
            (KernelAction::ToTable, None) => Action::Known(RuleAction::Lookup(table)),
            (KernelAction::Goto, Some(target)) => Action::Known(RuleAction::Goto(target)),
            (other, _) => Action::Other(format!("{other:?}").to_lowercase()),
        };
        let mark = (value != 0 || mask != 0).then_some(MarkMatch { value, mask });
        let shape = Self {
            priority,
            mark,
            action,
            extras,
        };
        (shape, protocol)
    }

    /// The rule that the kernel deletes when asked for this one is the first that agrees in what the request says;
    /// what the request leaves open (no mark, a goto's target, every other selector) agrees with anything.
    fn would_take(&self, other: &Self) -> bool {
        let same_action = match (&self.action, &other.action) {
            (Action::Known(RuleAction::Goto(_)), Action::Known(RuleAction::Goto(_))) => true,
            (own, others) => own == others,
        };
        self.priority == other.priority
            && same_action
            && (self.mark.is_none() || self.mark == other.mark)
    }

    /// Whether of two rules only the first is ever reached: jumps that differ in their target alone. Lookups are
    /// tried one after the other, so several of them can stand side by side.
    fn excludes(&self, other: &Self) -> bool {
        let selector = |shape: &Self| (shape.priority, shape.mark, shape.extras.clone());
        let jumps = |shape: &Self| matches!(shape.action, Action::Known(RuleAction::Goto(_)));
        jumps(self) && jumps(other) && selector(self) == selector(other)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.priority)?;
        for extra in &self.extras {
            write!(f, " {extra}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " fwmark {mark}")?;
        }
        match &self.action {
            Action::Known(RuleAction::Lookup(table)) => write!(f, " lookup {table}"),
            Action::Known(RuleAction::Goto(target)) => write!(f, " goto {target}"),
            Action::Other(action) => write!(f, " {action}"),
        }
    }
}

impl fmt::Display for ListedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} proto {}", self.shape, self.protocol)
    }
}

impl ListedRule {
    /// Its preference.
    pub fn priority(&self) -> u32 {
        self.shape.priority
    }

    /// The mark that it selects, whatever else it does.
    pub fn mark(&self) -> Option<MarkMatch> {
        self.shape.mark
    }

    fn parse(message: &RuleMessage) -> Option<Self> {
        let family = match message.header.family {
            AddressFamily::Inet => Family::V4,
            AddressFamily::Inet6 => Family::V6,
            _ => return None,
        };
        let (shape, protocol) = Shape::of_message(message);
        let rule = match shape.action {
            Action::Known(action) if shape.extras.is_empty() => Some(Rule {
                family,
                priority: shape.priority,
                fwmark: shape.mark,
                action,
            }),
            _ => None,
        };
        Some(Self {
            family,
            rule,
            protocol,
            shape,
        })
    }
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)));
    if let Some(mark) = rule.fwmark {
        attributes.push(RuleAttribute::FwMark(mark.value));
        attributes.push(RuleAttribute::FwMask(mark.mask));
    }
    match rule.action {
        RuleAction::Lookup(table) => {
            message.header.action = KernelAction::ToTable;
            message.header.table = u8::try_from(table).unwrap_or(TABLE_COMPAT);
            attributes.push(RuleAttribute::Table(table));
        }
        RuleAction::Goto(target) => {
            message.header.action = KernelAction::Goto;
            attributes.push(RuleAttribute::Goto(target));
        }
    }
    message
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn object(rule: &Rule) -> String {
    let version = match rule.family {
        Family::V4 => "",
        Family::V6 => "IPv6 ",
    };
    format!("{version}rule {}", Shape::of_plan(rule))
}

impl Netlink {
    /// Adds a rule.
    ///
    /// A rule of the same priority that selects other packets or does something else is another rule and no conflict,
    /// except for a `goto` of the same priority and selector to another target: only one of them would be reached.
    pub async fn add_rule(&self, rule: &Rule) -> Result<Made, NetlinkError> {
        let object = object(rule);
        // The kernel would add an identical rule beside one that carries another protocol number.
        match self.check_rule(rule).await? {
            Presence::Same => return Ok(Made::Existed),
            Presence::Different { found } => return Err(NetlinkError::Conflict { object, found }),
            Presence::Absent => {}
        }
        let request = RouteNetlinkMessage::NewRule(message(rule));
        match self.create(request).await {
            Ok(()) => Ok(Made::Created),
            // Somebody was faster, perhaps with another one.
            Err(e) if e.raw_os_error() == Some(EEXIST) => match self.check_rule(rule).await? {
                Presence::Same => Ok(Made::Existed),
                _ => Err(NetlinkError::kernel(object, e)),
            },
            Err(e) => Err(NetlinkError::kernel(object, e)),
        }
    }

    /// Whether exactly this rule exists.
    pub async fn has_rule(&self, rule: &Rule) -> Result<bool, NetlinkError> {
        Ok(self.check_rule(rule).await? == Presence::Same)
    }

    /// Compares what stands in the place of a rule.
    pub async fn check_rule(&self, rule: &Rule) -> Result<Presence, NetlinkError> {
        let wanted = Shape::of_plan(rule);
        let rules = self.rules(rule.family).await?;
        if rules.iter().any(|found| found.shape == wanted) {
            return Ok(Presence::Same);
        }
        let other = rules.iter().find(|found| found.shape.excludes(&wanted));
        Ok(match other {
            Some(found) => Presence::Different {
                found: found.to_string(),
            },
            None => Presence::Absent,
        })
    }

    /// Deletes exactly this rule if it is ours; false when it is not there.
    pub async fn del_rule(&self, rule: &Rule) -> Result<bool, NetlinkError> {
        let wanted = Shape::of_plan(rule);
        let rules = self.rules(rule.family).await?;
        let ours = || {
            rules
                .iter()
                .filter(|found| found.protocol == ROUTE_PROTOCOL)
        };
        if !ours().any(|found| found.shape == wanted) {
            return Ok(false);
        }
        // The kernel may prefer a rule that merely resembles this one.
        let first = ours().find(|found| wanted.would_take(&found.shape));
        if let Some(found) = first.filter(|found| found.shape != wanted) {
            let object = object(rule);
            let reason = format!("the kernel would delete `{found}` in its place");
            return Err(NetlinkError::kernel(object, io::Error::other(reason)));
        }
        let request = RouteNetlinkMessage::DelRule(message(rule));
        match self.change(request).await {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(ENOENT) => Ok(false),
            Err(e) => Err(NetlinkError::kernel(object(rule), e)),
        }
    }

    /// All rules of a family, in the order in which the kernel looks at them.
    pub async fn rules(&self, family: Family) -> Result<Vec<ListedRule>, NetlinkError> {
        let mut request = RuleMessage::default();
        request.header.family = address_family(family);
        let answer = self.list(RouteNetlinkMessage::GetRule(request)).await;
        let messages = answer.map_err(|e| NetlinkError::kernel("list of rules", e))?;
        let listed = messages.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRule(rule) => ListedRule::parse(rule),
            _ => None,
        });
        Ok(listed.collect())
    }
}
