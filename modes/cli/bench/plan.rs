//! What is measured when a user names a whole plan instead of variants and cases.

use lab::bench::Variant;
use lab::bench::case::{Case, Load, Path};

/// Variants, cases, rounds and seconds per sample.
pub(super) struct Plan {
    pub(super) variants: Vec<Variant>,
    pub(super) cases: Vec<Case>,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

impl Plan {
    /// Three minutes: the captures and no mesh, the main cases.
    pub(super) fn quick() -> Self {
        Self::of(Variant::DEFAULT.to_vec(), Case::quick(), 3, 3)
    }

    /// Less than 20 minutes on two processors: with the bound, enough rounds for intervals that hold.
    pub(super) fn full() -> Self {
        let variants = [Variant::None, Variant::Relay]
            .into_iter()
            .chain(Variant::DEFAULT.into_iter().filter(|v| *v != Variant::None));
        Self::of(variants.collect(), Case::full(), 6, 5)
    }

    /// Everything: hours.
    pub(super) fn all() -> Self {
        Self::of(Variant::ALL.to_vec(), Case::all(), 10, 5)
    }

    /// The cases of the full run with the captures and no mesh.
    pub(super) fn default() -> Self {
        Self::of(Variant::DEFAULT.to_vec(), Case::full(), 6, 5)
    }

    /// A variant against itself, five minutes, with three rounds more than its ten comparisons need to find anything.
    pub(super) fn self_check() -> Self {
        Self::of(vec![Variant::Inpod], Case::quick(), 12, 2)
    }

    /// The same with one request at a time. Where many wait for a processor, what is delayed on its way waits less for it
    /// afterwards: a delay that is short beside the queue does not show.
    pub(super) fn injected_delay() -> Self {
        let one = Load::RequestResponse { connections: 1 };
        let cases = [Path::CrossNode, Path::SameNode].map(|path| Case { path, load: one });
        Self::of(vec![Variant::Inpod], cases.to_vec(), 12, 2)
    }

    fn of(variants: Vec<Variant>, cases: Vec<Case>, rounds: usize, seconds: u64) -> Self {
        Self {
            variants,
            cases,
            rounds,
            seconds,
        }
    }
}
