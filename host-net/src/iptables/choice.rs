//! Which variant of iptables to use in a namespace.
//!
//! Rules of both variants are in force at the same time and do not see each other, so the choice has to agree with what
//! is there. What the kernel supports is found out by a trial in a namespace of its own, because either variant leaves
//! empty tables behind where it was used.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::{IptablesError, restore_with, tables_in_use};
use crate::netns::Netns;
use crate::plan::Family;

/// Environment variable with the operator's choice: `nft` or `legacy`.
pub const VARIANT_VARIABLE: &str = "AMBIDEX_IPTABLES";

/// The two implementations of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// `iptables-nft`: rules live in nf_tables.
    Nft,
    /// `iptables-legacy`: the kernel's older ip_tables.
    Legacy,
}

impl Variant {
    /// Both, in the order of preference.
    pub const ALL: [Variant; 2] = [Variant::Nft, Variant::Legacy];
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        })
    }
}

/// Chooses the variant for a namespace and family: `AMBIDEX_IPTABLES` if set; else the one that has rules there (both:
/// an error); else nft if it works on this machine; else legacy if that works.
pub fn choose(netns: &Netns, family: Family) -> Result<Variant, IptablesError> {
    match std::env::var(VARIANT_VARIABLE) {
        Ok(value) => chosen_by_operator(&value),
        Err(_) => choose_by_state(netns, family),
    }
}

pub(super) fn chosen_by_operator(value: &str) -> Result<Variant, IptablesError> {
    let variant = Variant::ALL.into_iter().find(|v| v.to_string() == value);
    variant.ok_or_else(|| IptablesError::Choice {
        value: value.to_owned(),
    })
}

pub(super) fn choose_by_state(netns: &Netns, family: Family) -> Result<Variant, IptablesError> {
    let tables = tables_in_use(netns, family)?;
    let has_rules = |variant| tables.iter().any(|t| t.variant == variant && !t.trivial);
    match (has_rules(Variant::Nft), has_rules(Variant::Legacy)) {
        (true, true) => return Err(IptablesError::mixed(netns.id(), &tables)),
        (true, false) => return Ok(Variant::Nft),
        (false, true) => return Ok(Variant::Legacy),
        (false, false) => {}
    }
    let Err(nft) = usable(Variant::Nft, family) else {
        return Ok(Variant::Nft);
    };
    match usable(Variant::Legacy, family) {
        Ok(()) => Ok(Variant::Legacy),
        Err(legacy) => Err(IptablesError::none_usable(family, nft, legacy)),
    }
}

/// Whether rules of the kinds that captures consist of can be applied on this machine. A success is remembered for the
/// life of the process; a failure is not, since the missing module or package may be installed.
pub fn usable(variant: Variant, family: Family) -> Result<(), IptablesError> {
    static USABLE: Mutex<BTreeSet<(Variant, Family)>> = Mutex::new(BTreeSet::new());
    let known = || USABLE.lock().unwrap_or_else(PoisonError::into_inner);
    if known().contains(&(variant, family)) {
        return Ok(());
    }
    trial(variant, family)?;
    known().insert((variant, family));
    Ok(())
}

/// Applies a few rules in a namespace that exists only for this.
fn trial(variant: Variant, family: Family) -> Result<(), IptablesError> {
    let script = match family {
        Family::V4 => {
            "*mangle\n:trial - [0:0]\n-A trial -m mark --mark 0x1/0x1 -j CONNMARK --save-mark\nCOMMIT\n\
             *nat\n:trial - [0:0]\n-A trial -p tcp -j REDIRECT --to-ports 1\nCOMMIT\n"
        }
        Family::V6 => "*filter\n:trial - [0:0]\n-A trial -j DROP\nCOMMIT\n",
    };
    let netns = Netns::create_unnamed().map_err(|source| IptablesError::Start {
        program: super::program(variant, family, super::Tool::Restore),
        source,
    })?;
    restore_with(variant, &netns, family, script)
}
