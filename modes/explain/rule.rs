//! One rule, of iptables read from the text that `iptables-save` prints, of nftables by [`super::nft`].

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its text: of iptables without `-A CHAIN`, of nftables as `nft -s` lists it.
    pub text: String,
    /// All of them must hold.
    pub matches: Vec<(bool, Match)>,
    /// What it does then.
    pub target: Target,
}

/// A value under a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Masked {
    /// Value.
    pub value: u32,
    /// Mask.
    pub mask: u32,
}

/// A condition. Whether it is negated stands beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// `-i`.
    In(String),
    /// `-o`.
    Out(String),
    /// `-s`.
    Source(IpNet),
    /// `-d`.
    Destination(IpNet),
    /// `-p`.
    Protocol(String),
    /// `--sport`, `--sports`.
    SourcePorts(Vec<RangeInclusive<u16>>),
    /// `--dport`, `--dports`.
    DestinationPorts(Vec<RangeInclusive<u16>>),
    /// `--tcp-flags MASK SET`.
    Flags(Vec<String>, Vec<String>),
    /// `-m mark --mark`.
    Mark(Masked),
    /// `-m connmark --mark`.
    ConnectionMark(Masked),
    /// `--match-set NAME src|dst`.
    Set(String, String),
    /// `--ctstate`.
    State(Vec<String>),
    /// `--socket-exists`: sent by a socket of this namespace.
    FromSocket,
    /// `-m socket --transparent`: a socket that speaks with any address waits for it.
    ForTransparentSocket,
    /// `--dst-type` (true) or `--src-type` (false).
    AddressType(bool, String),
    /// Index of the family ([`super::state::family`]).
    Family(usize),
    /// One of them holds.
    AnyOf(Vec<Match>),
    /// Something that is not evaluated.
    Unknown(String),
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Ends the table.
    Accept,
    /// Ends the packet.
    Drop,
    /// Ends the packet with an answer.
    Reject,
    /// Ends the chain.
    Return,
    /// The packet's mark.
    Mark(Masked),
    /// The connection's mark.
    ConnectionMark(Masked),
    /// The packet's mark into the connection's: masks of the packet's and of the connection's.
    SaveMark(u32, u32),
    /// The connection's mark into the packet's: masks of the packet's and of the connection's.
    RestoreMark(u32, u32),
    /// To a socket of this namespace whatever the destination.
    Tproxy(u16, Masked),
    /// To a socket of this namespace as `tproxy` of nftables does: marks and ends nothing, and fits only if one listens.
    Give(u16),
    /// All of them, in this order.
    Several(Vec<Target>),
    /// To a port of this namespace.
    Redirect(u16),
    /// Another destination.
    Dnat(Translation),
    /// Another source.
    Snat(Translation),
    /// Another source: the address of the device that it leaves by.
    Masquerade,
    /// Tracked apart.
    Zone(u16),
    /// Not tracked.
    Untracked,
    /// Nothing that the packet would notice.
    Nothing,
    /// Another chain.
    Chain(String),
    /// Another chain, without coming back.
    Goto(String),
    /// Something that is not evaluated.
    Unknown(String),
}

/// What an end of a packet becomes. Without a port it keeps its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Address.
    pub ip: IpAddr,
    /// Port.
    pub port: Option<u16>,
}

impl Translation {
    fn parse(text: &str) -> Option<Self> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Some(Self {
                ip: address.ip(),
                port: Some(address.port()),
            });
        }
        let ip = text.parse().ok()?;
        Some(Self { ip, port: None })
    }

    /// An end after it.
    pub fn of(self, end: SocketAddr) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(end.port()))
    }
}

impl Rule {
    /// Reads a rule. What is not known becomes [`Match::Unknown`] or [`Target::Unknown`], never an error.
    pub fn parse(text: &str) -> Self {
        let words = words(text);
        let mut parser = Parser {
            words: &words,
            at: 0,
            module: String::new(),
            matches: Vec::new(),
        };
        let target = parser.conditions();
        Self {
            text: text.to_owned(),
            matches: parser.matches,
            target,
        }
    }
}

/// The words of a rule; a text in double quotes is one.
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for c in text.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

struct Parser<'a> {
    words: &'a [String],
    at: usize,
    module: String,
    matches: Vec<(bool, Match)>,
}

impl Parser<'_> {
    fn next(&mut self) -> Option<&str> {
        let word = self.words.get(self.at)?;
        self.at += 1;
        Some(word)
    }

    fn argument(&mut self) -> String {
        self.next().unwrap_or_default().to_owned()
    }

    fn conditions(&mut self) -> Target {
        let mut negated = false;
        while let Some(word) = self.next() {
            let word = word.to_owned();
            match word.as_str() {
                "!" => negated = true,
                "-m" => self.module = self.argument(),
                "-j" => return self.target(),
                "-g" => return Target::Goto(self.argument()),
                _ => {
                    if let Some(condition) = self.condition(&word) {
                        self.matches.push((negated, condition));
                    }
                    negated = false;
                }
            }
        }
        Target::Nothing
    }

    fn condition(&mut self, option: &str) -> Option<Match> {
        let begin = self.at - 1;
        let known = match (self.module.as_str(), option) {
            (_, "-i") => Some(Match::In(self.argument())),
            (_, "-o") => Some(Match::Out(self.argument())),
            (_, "-s") => network(&self.argument()).map(Match::Source),
            (_, "-d") => network(&self.argument()).map(Match::Destination),
            (_, "-p") => Some(Match::Protocol(self.argument())),
            ("tcp" | "udp" | "multiport", "--sport" | "--sports") => {
                ports(&self.argument()).map(Match::SourcePorts)
            }
            ("tcp" | "udp" | "multiport", "--dport" | "--dports") => {
                ports(&self.argument()).map(Match::DestinationPorts)
            }
            ("tcp", "--tcp-flags") => Some(Match::Flags(
                listed(&self.argument()),
                listed(&self.argument()),
            )),
            ("mark", "--mark") => masked(&self.argument()).map(Match::Mark),
            ("connmark", "--mark") => masked(&self.argument()).map(Match::ConnectionMark),
            ("set", "--match-set") => Some(Match::Set(self.argument(), self.argument())),
            ("conntrack" | "state", "--ctstate" | "--state") => {
                Some(Match::State(listed(&self.argument())))
            }
            ("owner", "--socket-exists") => Some(Match::FromSocket),
            ("socket", "--transparent") => Some(Match::ForTransparentSocket),
            ("addrtype", "--dst-type") => Some(Match::AddressType(true, self.argument())),
            ("addrtype", "--src-type") => Some(Match::AddressType(false, self.argument())),
            ("comment", "--comment") => {
                self.argument();
                return None;
            }
            _ => None,
        };
        Some(known.unwrap_or_else(|| Match::Unknown(self.unknown(begin))))
    }

    /// The words of an option that is not known, up to the next one.
    fn unknown(&mut self, begin: usize) -> String {
        while let Some(word) = self.words.get(self.at)
            && word != "!"
            && !word.starts_with('-')
        {
            self.at += 1;
        }
        let module = std::mem::take(&mut self.module);
        let text = self.words[begin..self.at].join(" ");
        let text = format!("-m {module} {text}");
        self.module = module;
        text
    }

    fn target(&mut self) -> Target {
        let name = self.argument();
        let options = &self.words[self.at..];
        let value = |option: &str| {
            let at = options.iter().position(|word| word == option)?;
            options.get(at + 1).map(String::as_str)
        };
        let has = |option: &str| options.iter().any(|word| word == option);
        let mask = |option: &str| value(option).and_then(number).unwrap_or(u32::MAX);
        let mark = || value("--set-xmark").and_then(masked);
        let known = match name.as_str() {
            "ACCEPT" => Some(Target::Accept),
            "DROP" => Some(Target::Drop),
            "REJECT" => Some(Target::Reject),
            "RETURN" => Some(Target::Return),
            "MARK" => mark().map(Target::Mark),
            "CONNMARK" if has("--save-mark") => {
                Some(Target::SaveMark(mask("--nfmask"), mask("--ctmask")))
            }
            "CONNMARK" if has("--restore-mark") => {
                Some(Target::RestoreMark(mask("--nfmask"), mask("--ctmask")))
            }
            "CONNMARK" => mark().map(Target::ConnectionMark),
            "TPROXY" => port(value("--on-port"))
                .zip(value("--tproxy-mark").and_then(masked))
                .map(|(port, mark)| Target::Tproxy(port, mark)),
            "REDIRECT" => port(value("--to-ports")).map(Target::Redirect),
            "DNAT" => value("--to-destination")
                .and_then(Translation::parse)
                .map(Target::Dnat),
            "SNAT" => value("--to-source")
                .and_then(Translation::parse)
                .map(Target::Snat),
            "MASQUERADE" => Some(Target::Masquerade),
            "NOTRACK" => Some(Target::Untracked),
            "CT" if has("--notrack") => Some(Target::Untracked),
            "CT" => port(value("--zone")).map(Target::Zone),
            "LOG" | "NFLOG" | "TRACE" => Some(Target::Nothing),
            chain if options.is_empty() && !KNOWN_TARGETS.contains(&chain) => {
                Some(Target::Chain(chain.to_owned()))
            }
            _ => None,
        };
        known.unwrap_or_else(|| {
            let words: Vec<&str> = std::iter::once(name.as_str())
                .chain(options.iter().map(String::as_str))
                .collect();
            Target::Unknown(words.join(" "))
        })
    }
}

/// Targets of extensions that may stand without options and are no chains.
const KNOWN_TARGETS: [&str; 4] = ["QUEUE", "NFQUEUE", "SECMARK", "CHECKSUM"];

fn network(text: &str) -> Option<IpNet> {
    text.parse()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

fn listed(text: &str) -> Vec<String> {
    text.split(',').map(str::to_owned).collect()
}

fn ports(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    text.split(',')
        .map(|part| {
            let (first, last) = part.split_once(':').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        })
        .collect()
}

fn port(text: Option<&str>) -> Option<u16> {
    text?.parse().ok()
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn masked(text: &str) -> Option<Masked> {
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    Some(Masked { value, mask })
}

impl Masked {
    /// What a mark becomes: iptables' `--set-xmark`.
    pub fn applied(self, mark: u32) -> u32 {
        (mark & !self.mask) ^ self.value
    }

    /// Whether a mark has this value under this mask.
    pub fn fits(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }
}
