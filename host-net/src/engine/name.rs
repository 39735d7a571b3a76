//! How a step is named in messages: the object, as an operator would say it.

use std::fmt;

use crate::plan::{Family, Step};

/// The program that manages a family: `iptables` or `ip6tables`.
pub(crate) fn program(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Link(l) => write!(f, "{} device {}", l.overlay, l.name),
            Step::Address(a) => write!(f, "address {} on {}", a.addr, a.dev),
            Step::Rule(r) => {
                let version = match r.family {
                    Family::V4 => "",
                    Family::V6 => "-6 ",
                };
                write!(f, "ip {version}rule {}", r.priority)?;
                if let Some(mark) = r.fwmark {
                    write!(f, " (fwmark {mark})")?;
                }
                Ok(())
            }
            Step::Route(r) => write!(f, "route {} in table {}", r.dst, r.table),
            Step::Sysctl(s) => write!(f, "sysctl {}", s.key),
            Step::Chain(c) => write!(
                f,
                "{} chain {} in table {}",
                program(c.family),
                c.name,
                c.table.as_str()
            ),
            Step::ChainRule(r) => write!(
                f,
                "{} rule `{}` in chain {} of table {}",
                program(r.family),
                r.rule,
                r.chain,
                r.table.as_str()
            ),
            Step::NftTable(t) => write!(f, "nftables table inet {}", t.name),
            Step::Set(s) => write!(f, "ipset {}", s.name),
            Step::Member(m) => write!(f, "entry {} of ipset {}", m.ip, m.set),
        }
    }
}
