//! The network state of one namespace, in the form in which packets are led through it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use host_net::dump::Dump;
use ipnet::IpNet;

use super::rule::Rule;

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    /// Name.
    pub name: String,
    /// Index in its namespace.
    pub index: u32,
    /// Index of a veth's other end, in that one's namespace.
    pub peer: Option<u32>,
    /// Name of the bridge that it is a port of.
    pub master: Option<String>,
    /// What it wraps packets into.
    pub overlay: Option<Overlay>,
    /// Longest packet in bytes.
    pub mtu: Option<u32>,
}

/// The parameters of an overlay device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// `geneve` or `vxlan`.
    pub kind: String,
    /// Network identifier.
    pub vni: u32,
    /// The other end.
    pub remote: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// A policy routing rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// Preference.
    pub priority: u32,
    /// Value and mask.
    pub mark: Option<(u32, u32)>,
    /// What it does.
    pub action: Action,
    /// Selectors that are not evaluated.
    pub unknown: Option<String>,
    /// As `ip rule` shows it.
    pub text: String,
}

/// What a policy routing rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Looks into a table.
    Lookup(u32),
    /// Goes on at a preference.
    Goto(u32),
    /// Something that is not evaluated.
    Other,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Table.
    pub table: u32,
    /// Destination.
    pub destination: IpNet,
    /// `unicast`, `local`, `blackhole`…
    pub kind: String,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Device.
    pub device: String,
    /// Source that a socket without an address gets.
    pub source: Option<IpAddr>,
    /// Of two routes to one destination the smaller one counts.
    pub metric: u32,
    /// As `ip route` shows it.
    pub text: String,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    /// What becomes of what no rule decided; none in an own chain.
    pub policy: Option<String>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// A chain of nftables that hangs in the path of packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its table's name among those of [`State::tables`].
    pub table: String,
    /// Its own.
    pub chain: String,
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// As iptables has it: `PREROUTING`.
    pub hook: String,
    /// Lower is passed first.
    pub priority: i32,
    /// Whose packets pass it.
    pub families: &'static [usize],
}

/// Tables of one family by name, with their chains by name.
pub type Tables = BTreeMap<String, BTreeMap<String, Chain>>;

/// The state of one namespace.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Devices.
    pub devices: Vec<Device>,
    /// Addresses with their devices, in the kernel's order.
    pub addresses: Vec<(String, IpAddr)>,
    /// The same as `ip address` shows them.
    pub networks: Vec<(String, IpNet)>,
    /// Policy rules of IPv4 and IPv6, in order.
    pub rules: [Vec<PolicyRule>; 2],
    /// Routes.
    pub routes: Vec<Route>,
    /// Members of the sets.
    pub sets: BTreeMap<String, BTreeSet<IpAddr>>,
    /// iptables and ip6tables; those of nftables under their names with the family, `inet istio-ambient-nat`.
    pub tables: [Tables; 2],
    /// Where nftables' own tables hang, by priority.
    pub bases: Vec<Base>,
    /// Sysctls by their key.
    pub sysctls: BTreeMap<String, String>,
    /// What listens.
    pub listeners: BTreeSet<SocketAddr>,
    /// nftables' own tables, which have hooks that are not evaluated.
    pub not_evaluated: BTreeSet<String>,
}

/// Index of a family in [`State::rules`] and [`State::tables`].
pub fn family(ip: IpAddr) -> usize {
    usize::from(ip.is_ipv6())
}

impl State {
    /// Reads a dump, which has no indices of devices and no listeners.
    pub fn parse(dump: &Dump) -> Self {
        let mut state = Self::default();
        for line in &dump.links {
            state.devices.extend(device(line));
        }
        for line in &dump.addresses {
            state.networks.extend(address(line));
        }
        let own = state.networks.iter();
        state.addresses = own
            .map(|(device, net)| (device.clone(), net.addr()))
            .collect();
        for line in &dump.rules {
            let family = usize::from(line.starts_with("rule6"));
            state.rules[family].extend(policy_rule(line));
        }
        state.routes = dump.routes.iter().filter_map(|line| route(line)).collect();
        state.add_own_routes();
        for line in &dump.ipsets {
            state.set_line(line);
        }
        for line in &dump.iptables {
            state.iptables_line(line);
        }
        for line in &dump.sysctls {
            let setting = line
                .strip_prefix("sysctl ")
                .and_then(|rest| rest.split_once(" = "));
            let owned = setting.map(|(key, value)| (key.to_owned(), value.to_owned()));
            state.sysctls.extend(owned);
        }
        // Content is listed only of tables that iptables does not show.
        let own = dump.nftables.iter().filter(|line| line.contains(" | "));
        let names = own.filter_map(|line| line.strip_prefix("nft ")?.split_once(" | "));
        state.not_evaluated = names.map(|(name, _)| name.to_owned()).collect();
        state
    }

    /// What the kernel has for IPv6 addresses of its own and a dump leaves out.
    fn add_own_routes(&mut self) {
        for (device, ip) in &self.addresses {
            if ip.is_ipv6() {
                let line = format!("route6 local {ip}/128 dev {device} table 255");
                self.routes.extend(route(&line));
            }
        }
    }

    fn set_line(&mut self, line: &str) {
        let mut words = line.split(' ').skip(1);
        let (Some(name), Some(what)) = (words.next(), words.next()) else {
            return;
        };
        let members = self.sets.entry(name.to_owned()).or_default();
        if what == "member" {
            members.extend(words.next().and_then(|ip| ip.parse::<IpAddr>().ok()));
        }
    }

    /// `iptables-nft TABLE :CHAIN POLICY` or `… -A CHAIN RULE`.
    fn iptables_line(&mut self, line: &str) {
        let mut parts = line.splitn(3, ' ');
        let (Some(tool), Some(table), Some(rest)) = (parts.next(), parts.next(), parts.next())
        else {
            return;
        };
        let family = usize::from(tool.starts_with("ip6"));
        let chains = self.tables[family].entry(table.to_owned()).or_default();
        if let Some(chain) = rest.strip_prefix(':') {
            let (name, policy) = chain.split_once(' ').unwrap_or((chain, "-"));
            let chain = chains.entry(name.to_owned()).or_default();
            chain.policy = (policy != "-").then(|| policy.to_owned());
        } else if let Some(rule) = rest.strip_prefix("-A ") {
            let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
            let chain = chains.entry(chain.to_owned()).or_default();
            chain.rules.push(Rule::parse(rule));
        }
    }

    /// A device by name.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// Whether an address is one of this namespace's own.
    pub fn owns(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|(_, own)| *own == ip) || ip.is_loopback()
    }

    /// The first address of a device, of the same family as `like`.
    pub fn address_of(&self, device: &str, like: IpAddr) -> Option<IpAddr> {
        let mut of_device = self.addresses.iter().filter(|(dev, _)| dev == device);
        of_device
            .find(|(_, ip)| ip.is_ipv4() == like.is_ipv4())
            .map(|(_, ip)| *ip)
    }

    /// A device with its MTU and its first address of the same family as `like`: `istioout (mtu 1450, inet 192.168.127.1/30)`.
    pub fn shown(&self, device: &str, like: IpAddr) -> String {
        let mtu = self.device(device).and_then(|device| device.mtu);
        let mut of_device = self.networks.iter().filter(|(dev, _)| dev == device);
        let net = of_device.find(|(_, net)| net.addr().is_ipv4() == like.is_ipv4());
        let family = if like.is_ipv4() { "inet" } else { "inet6" };
        let known = mtu.map(|mtu| format!("mtu {mtu}")).into_iter();
        let known = known.chain(net.map(|(_, net)| format!("{family} {net}")));
        let known: Vec<String> = known.collect();
        if known.is_empty() {
            return device.to_owned();
        }
        format!("{device} ({})", known.join(", "))
    }

    /// A sysctl as a number; 0 when it is not there.
    pub fn sysctl(&self, key: &str) -> u32 {
        self.sysctls
            .get(key)
            .and_then(|value| value.parse().ok())
            .unwrap_or(0)
    }

    /// Whether somebody listens on this address.
    pub fn listens(&self, at: SocketAddr) -> bool {
        self.listeners.iter().any(|listener| {
            // A socket of IPv6 takes connections of IPv4, too, and not the other way round.
            let any = match listener.ip() {
                IpAddr::V4(ip) => ip.is_unspecified() && at.is_ipv4(),
                IpAddr::V6(ip) => ip.is_unspecified(),
            };
            listener.port() == at.port() && (any || listener.ip() == at.ip())
        })
    }
}

/// The word after another one.
fn after<'a>(words: &[&'a str], key: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| *word == key)?;
    words.get(at + 1).copied()
}

fn device(line: &str) -> Option<Device> {
    let words: Vec<&str> = line.split(' ').collect();
    let overlay = || {
        let kind = words
            .iter()
            .find(|word| ["geneve", "vxlan"].contains(word))?;
        Some(Overlay {
            kind: (*kind).to_owned(),
            vni: after(&words, "id")?.parse().ok()?,
            remote: after(&words, "remote")?.parse().ok()?,
            port: after(&words, "dstport")?.parse().ok()?,
        })
    };
    Some(Device {
        name: (*words.get(1)?).to_owned(),
        master: after(&words, "master").map(str::to_owned),
        overlay: overlay(),
        mtu: after(&words, "mtu").and_then(|word| word.parse().ok()),
        ..Device::default()
    })
}

fn address(line: &str) -> Option<(String, IpNet)> {
    let words: Vec<&str> = line.split(' ').collect();
    let net: IpNet = words.get(1)?.parse().ok()?;
    Some((after(&words, "dev")?.to_owned(), net))
}

/// `rule4 100: fwmark 0x200/0x200 goto 32766 proto 133`.
pub fn policy_rule(line: &str) -> Option<PolicyRule> {
    let (_, rest) = line.split_once(' ')?;
    let (priority, selectors) = rest.split_once(": ")?;
    let mut mark = None;
    let mut action = Action::Other;
    let mut unknown = Vec::new();
    let mut words = selectors.split(' ');
    let hex = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    while let Some(word) = words.next() {
        match word {
            "fwmark" => {
                let (value, mask) = words.next()?.split_once('/')?;
                mark = Some((hex(value)?, hex(mask)?));
            }
            "lookup" => action = Action::Lookup(words.next()?.parse().ok()?),
            "goto" => action = Action::Goto(words.next()?.parse().ok()?),
            "proto" => {
                words.next();
            }
            other => unknown.push(other),
        }
    }
    let text = format!("{priority}: {}", as_ip_rule(selectors));
    Some(PolicyRule {
        priority: priority.parse().ok()?,
        mark,
        action,
        unknown: (!unknown.is_empty()).then(|| unknown.join(" ")),
        text,
    })
}

/// `route4 local 0.0.0.0/0 dev lo table 100 proto 133 scope host`.
pub fn route(line: &str) -> Option<Route> {
    let (_, rest) = line.split_once(' ')?;
    let words: Vec<&str> = rest.split(' ').collect();
    let (kind, at) = match words.first()?.parse::<IpNet>() {
        Ok(_) => ("unicast", 0),
        Err(_) => (words[0], 1),
    };
    let parsed = |key| after(&words, key).and_then(|word| word.parse().ok());
    Some(Route {
        table: after(&words, "table")?.parse().ok()?,
        destination: words.get(at)?.parse().ok()?,
        kind: kind.to_owned(),
        via: parsed("via"),
        device: after(&words, "dev").unwrap_or_default().to_owned(),
        source: parsed("src"),
        metric: after(&words, "metric")
            .and_then(|word| word.parse().ok())
            .unwrap_or(0),
        text: as_ip_route(rest),
    })
}

/// The selectors and the action of a policy rule as `ip rule` prints them.
fn as_ip_rule(text: &str) -> String {
    let text = without(text, "proto");
    let (selectors, action) = match text.split_once("lookup ") {
        Some((selectors, table)) => (selectors, format!("lookup {}", table_name(table))),
        None => ("", text.clone()),
    };
    let from = if text.starts_with("from ") {
        ""
    } else {
        "from all "
    };
    format!("{from}{selectors}{action}")
}

/// A route as `ip route show table N` prints it.
fn as_ip_route(text: &str) -> String {
    let text = without(&without(text, "proto"), "table");
    let words = text.split(' ').map(|word| match word.parse::<IpNet>() {
        Ok(net) if net.prefix_len() == 0 => "default".to_owned(),
        Ok(net) if net.prefix_len() == net.max_prefix_len() => net.addr().to_string(),
        _ => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// What `ip` calls a table.
pub fn table_name(table: &str) -> &str {
    match table {
        "255" => "local",
        "254" => "main",
        "253" => "default",
        other => other,
    }
}

/// Without one word and its value.
fn without(text: &str, key: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    if let Some(at) = words.iter().position(|word| *word == key) {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.join(" ")
}
