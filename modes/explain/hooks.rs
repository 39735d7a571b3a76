//! Rules of iptables and of nftables, met by a packet at one hook.

use std::net::IpAddr;

use super::hop::{Change, Hop, Kind, RuleHit};
use super::packet::{End, Packet, Payload, Tracking, at};
use super::rule::{Match, Rule, Target};
use super::state::{Base, State, Tables, family};
use super::world::{OwnRules, SocketEnd, shown};

/// Own chains that call each other are a mistake that iptables refuses; deeper nesting than this is not met.
const DEPTH: usize = 16;
/// Where iptables' tables hang among the chains of nftables (`NF_IP_PRI_*`), without that of the table nat.
const PRIORITIES: [(&str, i32); 4] = [
    ("raw", -300),
    ("mangle", -150),
    ("filter", 0),
    ("security", 50),
];
/// Where connection tracking looks a packet up.
pub(super) const CONNECTION_TRACKING: i32 = -200;
/// Where destinations are translated.
pub(super) const DESTINATIONS: i32 = -100;
/// Where sources are.
pub(super) const SOURCES: i32 = 100;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Accept,
    /// It ends here.
    Drop,
}

/// How a chain was left.
enum Flow {
    Next,
    Return,
    End(Verdict),
}

/// What a rule does to a packet.
struct Effect {
    flow: Flow,
    unknown: Option<String>,
    /// Without effect.
    idle: bool,
    /// A statement does not fit: those behind it are not done.
    unfit: bool,
}

impl Effect {
    fn new() -> Self {
        Self {
            flow: Flow::Next,
            unknown: None,
            idle: false,
            unfit: false,
        }
    }
}

/// Whether a condition holds.
enum Holds {
    Yes,
    No,
    Unknown(String),
}

/// A packet at a hook of a namespace.
pub(super) struct Hook<'a> {
    pub(super) place: &'a str,
    pub(super) state: &'a State,
    pub(super) sockets: &'a [SocketEnd],
    pub(super) own: &'a OwnRules,
    pub(super) tracking: &'a mut Tracking,
    pub(super) packet: &'a mut Packet,
    pub(super) input: Option<&'a str>,
    pub(super) output: Option<&'a str>,
    pub(super) hops: &'a mut Vec<Hop>,
    /// Set by rules of the table raw: the zone, or not tracked at all.
    pub(super) zone: Option<u16>,
    /// Set by what has the kernel look up the route again.
    pub(super) reroute: bool,
    translation: Option<std::net::SocketAddr>,
}

impl<'a> Hook<'a> {
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a place, which are borrowed apart"
    )]
    pub(super) fn new(
        place: &'a str,
        state: &'a State,
        sockets: &'a [SocketEnd],
        own: &'a OwnRules,
        tracking: &'a mut Tracking,
        packet: &'a mut Packet,
        input: Option<&'a str>,
        output: Option<&'a str>,
        hops: &'a mut Vec<Hop>,
    ) -> Self {
        Self {
            place,
            state,
            sockets,
            own,
            tracking,
            packet,
            input,
            output,
            hops,
            zone: Some(0),
            reroute: false,
            translation: None,
        }
    }

    fn tables(&self) -> &'a Tables {
        &self.state.tables[family(self.packet.tuple.to.ip())]
    }

    /// Leads the packet past everything that hangs at a hook with these priorities, but for what translates addresses.
    pub(super) fn pass(&mut self, hook: &str, priorities: std::ops::Range<i32>) -> Verdict {
        let family = family(self.packet.tuple.to.ip());
        let state = self.state;
        let of_iptables =
            PRIORITIES.map(|(table, priority)| (priority, table, hook, table == "mangle"));
        let here = |base: &&Base| base.hook == hook && base.families.contains(&family);
        let of_nftables = state
            .bases
            .iter()
            .filter(here)
            .filter(|base| base.kind != "nat");
        let of_nftables = of_nftables.map(|base| {
            let (table, chain) = (base.table.as_str(), base.chain.as_str());
            (base.priority, table, chain, base.kind == "route")
        });
        let mut all: Vec<_> = of_iptables.into_iter().chain(of_nftables).collect();
        all.retain(|(priority, ..)| priorities.contains(priority));
        all.sort_by_key(|(priority, ..)| *priority);
        for (_, table, chain, reroutes) in all {
            let before = self.packet.mark;
            if self.meet(table, chain) == Verdict::Drop {
                return Verdict::Drop;
            }
            self.reroute |= reroutes && self.packet.mark != before;
        }
        Verdict::Accept
    }

    /// Everything that translates addresses at a hook, until something does.
    fn decide(&mut self, hook: &str) -> Verdict {
        let family = family(self.packet.tuple.to.ip());
        let state = self.state;
        let usual = match hook {
            "INPUT" | "POSTROUTING" => SOURCES,
            _ => DESTINATIONS,
        };
        let mut all = vec![(usual, "nat", hook)];
        for base in &state.bases {
            if base.kind == "nat" && base.hook == hook && base.families.contains(&family) {
                all.push((base.priority, &base.table, &base.chain));
            }
        }
        all.sort_by_key(|(priority, ..)| *priority);
        for (_, table, chain) in all {
            if self.meet(table, chain) == Verdict::Drop {
                return Verdict::Drop;
            }
            if self.translation.is_some() {
                break;
            }
        }
        Verdict::Accept
    }

    /// Leads the packet through a chain that hangs at a hook.
    fn meet(&mut self, table: &str, chain: &str) -> Verdict {
        if self
            .tables()
            .get(table)
            .is_none_or(|chains| !chains.contains_key(chain))
        {
            return Verdict::Accept;
        }
        if let Flow::End(verdict) = self.chain(table, chain, 0) {
            return verdict;
        }
        let policy = self.tables()[table][chain].policy.as_deref();
        if policy != Some("DROP") {
            return Verdict::Accept;
        }
        let text = format!("the policy of {table} {chain} is DROP");
        self.note(Kind::Dropped, text, self.packet.mark, self.connmark(), None);
        Verdict::Drop
    }

    /// What translates one end of a connection that begins; then what was decided for it.
    pub(super) fn translate(&mut self, chain: &str, end: End) -> Verdict {
        let Some(tracked) = self.packet.tracked else {
            return Verdict::Accept;
        };
        let mut by_rule = false;
        if !tracked.reply && self.tracking.entries[tracked.entry].is_open(end) {
            if self.decide(chain) == Verdict::Drop {
                return Verdict::Drop;
            }
            let to = self.translation.take();
            by_rule = to.is_some();
            self.tracking.entries[tracked.entry].decide(end, to);
        }
        let before = self.packet.tuple;
        let after = self.tracking.entries[tracked.entry].translated(before, tracked.reply, end);
        self.packet.tuple = after;
        if by_rule {
            if let Some(hop) = self.hops.last_mut() {
                hop.packet = shown(after);
            }
        } else if before != after {
            let text = match end {
                End::Destination => format!("translated back: to {}", shown_end(after.to)),
                End::Source => format!("translated back: from {}", shown_end(after.from)),
            };
            self.note(
                Kind::Translated,
                text,
                self.packet.mark,
                self.connmark(),
                None,
            );
        }
        Verdict::Accept
    }

    pub(super) fn connmark(&self) -> u32 {
        self.tracking.mark(self.packet)
    }

    fn note(&mut self, kind: Kind, text: String, mark: u32, connmark: u32, rule: Option<RuleHit>) {
        self.hops.push(Hop {
            place: self.place.to_owned(),
            device: self.input.or(self.output).map(str::to_owned),
            kind,
            text,
            packet: shown(self.packet.tuple),
            mark: Change::of(mark, self.packet.mark),
            connmark: Change::of(connmark, self.connmark()),
            rule,
            route: None,
            detail: false,
            unknown: None,
            differs: None,
        });
    }

    fn chain(&mut self, table: &str, chain: &str, depth: usize) -> Flow {
        let Some(rules) = self
            .tables()
            .get(table)
            .and_then(|chains| chains.get(chain))
        else {
            return Flow::Next;
        };
        for (index, rule) in rules.rules.iter().enumerate() {
            let hit = |own: &OwnRules| RuleHit {
                table: table.to_owned(),
                chain: chain.to_owned(),
                position: index + 1,
                text: rule.text.clone(),
                foreign: !own.contains(table, chain, &rule.text),
            };
            match self.all_hold(rule) {
                Holds::No => continue,
                Holds::Unknown(what) => {
                    let hit = hit(self.own);
                    let text = format!("{table} {chain} #{}: cannot be told", index + 1);
                    self.note(
                        Kind::Rule,
                        text,
                        self.packet.mark,
                        self.connmark(),
                        Some(hit),
                    );
                    if let Some(hop) = self.hops.last_mut() {
                        hop.unknown = Some(what);
                    }
                    continue;
                }
                Holds::Yes => {}
            }
            if let Target::Chain(name) | Target::Goto(name) = &rule.target {
                let inside = if depth < DEPTH {
                    self.chain(table, name, depth + 1)
                } else {
                    Flow::Next
                };
                match inside {
                    Flow::End(verdict) => return Flow::End(verdict),
                    _ if matches!(rule.target, Target::Goto(_)) => return Flow::Return,
                    _ => continue,
                }
            }
            let hit = hit(self.own);
            match self.act(rule, hit) {
                Flow::Next => {}
                left => return left,
            }
        }
        Flow::Next
    }

    /// Does what a rule that matches says.
    fn act(&mut self, rule: &Rule, hit: RuleHit) -> Flow {
        let (mark, connmark) = (self.packet.mark, self.connmark());
        let text = format!("{} {} #{}", hit.table, hit.chain, hit.position);
        let mut effect = Effect::new();
        self.apply(&rule.target, &mut effect);
        let dropped = matches!(effect.flow, Flow::End(Verdict::Drop));
        let kind = if dropped { Kind::Dropped } else { Kind::Rule };
        self.note(kind, text, mark, connmark, Some(hit));
        if let Some(hop) = self.hops.last_mut() {
            hop.unknown = effect.unknown;
            hop.detail = effect.idle;
        }
        effect.flow
    }

    fn apply(&mut self, target: &Target, effect: &mut Effect) {
        let (mark, connmark) = (self.packet.mark, self.connmark());
        let ended = Flow::End;
        match target {
            Target::Several(targets) => {
                for target in targets {
                    self.apply(target, effect);
                    if effect.unfit {
                        break;
                    }
                }
            }
            Target::Accept => effect.flow = ended(Verdict::Accept),
            Target::Drop | Target::Reject => effect.flow = ended(Verdict::Drop),
            Target::Return => (effect.flow, effect.idle) = (Flow::Return, true),
            Target::Mark(value) => self.packet.mark = value.applied(mark),
            Target::ConnectionMark(value) => {
                self.tracking.set_mark(self.packet, value.applied(connmark));
            }
            Target::SaveMark(packet, connection) => {
                let saved = (connmark & !connection) ^ (mark & packet);
                self.tracking.set_mark(self.packet, saved);
            }
            Target::RestoreMark(packet, connection) => {
                self.packet.mark = (mark & !packet) ^ (connmark & connection);
            }
            Target::Tproxy(port, value) => {
                if self.may_give(*port) {
                    effect.flow = ended(Verdict::Accept);
                    self.packet.mark = value.applied(mark);
                } else {
                    effect.flow = ended(Verdict::Drop);
                    effect.unknown = Some(format!("nobody listens on port {port}"));
                }
            }
            Target::Give(port) => {
                effect.unfit = !self.may_give(*port);
                if effect.unfit {
                    effect.unknown = Some(format!("nobody listens on port {port}"));
                }
            }
            Target::Redirect(port) => {
                let ip = self.own_address();
                self.translation = Some(at(ip, *port));
                effect.flow = ended(Verdict::Accept);
            }
            Target::Dnat(to) => {
                self.translation = Some(to.of(self.packet.tuple.to));
                effect.flow = ended(Verdict::Accept);
            }
            Target::Snat(to) => {
                self.translation = Some(to.of(self.packet.tuple.from));
                effect.flow = ended(Verdict::Accept);
            }
            Target::Masquerade => {
                let like = self.packet.tuple.from;
                let ip = self
                    .output
                    .and_then(|dev| self.state.address_of(dev, like.ip()));
                self.translation = Some(at(ip.unwrap_or(like.ip()), like.port()));
                effect.flow = ended(Verdict::Accept);
            }
            Target::Zone(zone) => self.zone = Some(*zone),
            Target::Untracked => self.zone = None,
            Target::Nothing => effect.idle = true,
            Target::Unknown(what) => effect.unknown = Some(what.clone()),
            // Alone these are followed by `chain`; nftables has them behind statements, too.
            Target::Chain(name) | Target::Goto(name) => {
                effect.unknown = Some(format!("jump to {name} behind another statement"));
            }
        }
    }

    /// Gives the packet to a socket of this namespace that listens on this port, or has the connection already.
    fn may_give(&mut self, port: u16) -> bool {
        let listens = self.state.listens(at(self.packet.tuple.to.ip(), port));
        let found = self.is_for_socket(false) || listens;
        if found {
            self.packet.given_to = Some(port);
        }
        found
    }

    /// Where REDIRECT leads: loopback for what is sent from here, the input device's address for what arrives.
    fn own_address(&self) -> IpAddr {
        let like = self.packet.tuple.to.ip();
        let loopback = if like.is_ipv4() {
            IpAddr::from([127, 0, 0, 1])
        } else {
            IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
        };
        let arrived = self.input.and_then(|dev| self.state.address_of(dev, like));
        arrived.unwrap_or(loopback)
    }

    fn all_hold(&self, rule: &Rule) -> Holds {
        let mut unknown = None;
        for (negated, condition) in &rule.matches {
            match self.holds(condition) {
                Ok(holds) if holds != *negated => {}
                Ok(_) => return Holds::No,
                Err(what) => {
                    unknown.get_or_insert(what);
                }
            }
        }
        unknown.map_or(Holds::Yes, Holds::Unknown)
    }

    fn holds(&self, condition: &Match) -> Result<bool, String> {
        let Packet {
            tuple,
            payload,
            mark,
            ..
        } = &*self.packet;
        Ok(match condition {
            Match::In(name) => is_device(self.input, name),
            Match::Out(name) => is_device(self.output, name),
            Match::Source(net) => net.contains(&tuple.from.ip()),
            Match::Destination(net) => net.contains(&tuple.to.ip()),
            Match::Protocol(name) => name == payload.protocol() || name == "all",
            Match::SourcePorts(ports) => {
                ports.iter().any(|range| range.contains(&tuple.from.port()))
            }
            Match::DestinationPorts(ports) => {
                ports.iter().any(|range| range.contains(&tuple.to.port()))
            }
            Match::Flags(mask, set) => {
                let flags = payload.flags();
                let has = |flag: &String| flags.contains(&flag.as_str());
                *payload != Payload::Overlay
                    && mask.iter().all(|flag| has(flag) == set.contains(flag))
            }
            Match::Mark(masked) => masked.fits(*mark),
            Match::ConnectionMark(masked) => {
                self.packet.tracked.is_some() && masked.fits(self.connmark())
            }
            Match::Set(name, direction) => {
                let ip = match direction.as_str() {
                    "src" => tuple.from.ip(),
                    "dst" => tuple.to.ip(),
                    _ => return Err(format!("a set of more than addresses: {name} {direction}")),
                };
                match self.state.sets.get(name) {
                    Some(members) => members.contains(&ip),
                    None => return Err(format!("no set {name}")),
                }
            }
            Match::State(states) => {
                let state = self.tracking.state(self.packet);
                states.iter().any(|wanted| wanted == state)
            }
            Match::FromSocket => self.packet.from_socket,
            Match::ForTransparentSocket => self.is_for_socket(true),
            Match::AddressType(destination, name) => {
                let ip = if *destination {
                    tuple.to.ip()
                } else {
                    tuple.from.ip()
                };
                match name.as_str() {
                    "LOCAL" => self.state.owns(ip),
                    other => return Err(format!("addresses of type {other}")),
                }
            }
            Match::Family(index) => family(tuple.to.ip()) == *index,
            Match::AnyOf(conditions) => {
                let mut any = false;
                for condition in conditions {
                    any |= self.holds(condition)?;
                }
                any
            }
            Match::Unknown(what) => return Err(what.clone()),
        })
    }

    /// Whether an open connection of this namespace waits for the packet.
    fn is_for_socket(&self, transparent: bool) -> bool {
        self.sockets.iter().any(|socket| {
            socket.local == self.packet.tuple.to
                && socket.remote == self.packet.tuple.from
                && (socket.transparent || !transparent)
        })
    }
}

fn is_device(device: Option<&str>, wanted: &str) -> bool {
    let Some(device) = device else {
        return false;
    };
    match wanted.strip_suffix('+') {
        Some(prefix) => device.starts_with(prefix),
        None => device == wanted,
    }
}

fn shown_end(end: std::net::SocketAddr) -> String {
    super::world::end(end)
}
