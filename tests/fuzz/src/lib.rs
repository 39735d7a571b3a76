//! A driver for fuzz targets that needs nothing but a stable compiler: a target is a test of the crate whose parser it feeds.
//!
//! An input is a valid message as it is, a damaged one, two halves of two, or random bytes. The driver knows nothing of coverage.
//! In its place it looks at what a target says: inputs that were refused for a reason, or taken in a way, not met before are kept
//! and damaged further. So the search goes on from whatever came past one more check.
//!
//! Environment: `AMBIDEX_FUZZ_INPUTS` (inputs per target, [`DEFAULT_INPUTS`] without it), `AMBIDEX_FUZZ_SEED` (one seed, one
//! sequence), `AMBIDEX_FUZZ_RECORD` (a file to which a line is added; for one target per process, since it has the process's memory).
#![forbid(unsafe_code)]

mod mutate;
mod random;
mod record;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

pub use random::Random;

/// Inputs per target where nobody asks for more: what an ordinary test run has time for.
pub const DEFAULT_INPUTS: u64 = 4000;
/// Inputs are cut to this length, unless a seed is longer: more than any buffer that a parser here is given in one piece.
const LONGEST: usize = 4096;
/// Inputs that are kept besides the seeds.
const KEPT: usize = 4096;
/// No input may take longer. Far over what any needs, so that a machine under load fails nothing.
const SLOWEST: Duration = Duration::from_secs(20);

/// What a target did with an input. Everything else that it may do, it does by panicking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It was a message. The word tells what kind, for the search.
    Taken(&'static str),
    /// It was none, for this reason. A reason is never empty.
    Refused(String),
}

impl Verdict {
    /// Refused for what an error says.
    pub fn refused(error: impl ToString) -> Self {
        Self::Refused(error.to_string())
    }

    /// Something small that verdicts of one kind share: numbers and quoted pieces of the input are left out.
    fn signature(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        match self {
            Self::Taken(kind) => (1, kind).hash(&mut hasher),
            Self::Refused(reason) => {
                let mut quoted = false;
                for byte in reason.bytes().take(160) {
                    match byte {
                        b'"' | b'`' => quoted = !quoted,
                        b'[' => quoted = true,
                        b']' => quoted = false,
                        b'0'..=b'9' => {}
                        byte if !quoted => byte.hash(&mut hasher),
                        _ => {}
                    }
                }
            }
        }
        hasher.finish()
    }
}

/// Makes a valid input.
type Maker<'a> = Box<dyn Fn(&mut Random) -> Vec<u8> + 'a>;

/// A parser and what is known about its input.
pub struct Target<'a> {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    words: &'a [&'a [u8]],
    make: Option<Maker<'a>>,
}

impl<'a> Target<'a> {
    /// A target with valid inputs to begin with.
    ///
    /// # Panics
    /// Without any seed.
    pub fn new(name: &'static str, seeds: impl IntoIterator<Item = impl Into<Vec<u8>>>) -> Self {
        let seeds: Vec<Vec<u8>> = seeds.into_iter().map(Into::into).collect();
        assert!(!seeds.is_empty(), "{name}: no seed");
        Self {
            name,
            seeds,
            words: &[],
            make: None,
        }
    }

    /// Pieces of the format, to be put anywhere.
    pub fn words(mut self, words: &'a [&'a [u8]]) -> Self {
        self.words = words;
        self
    }

    /// Makes further valid inputs.
    pub fn maker(mut self, make: impl Fn(&mut Random) -> Vec<u8> + 'a) -> Self {
        self.make = Some(Box::new(make));
        self
    }

    /// Feeds a parser as often as the environment says.
    ///
    /// # Panics
    /// When the parser panics (with the input, the seed, and the panic's own message before), refuses without a reason, takes
    /// none or refuses none of many inputs (then the target tests nothing), or is too slow or too large.
    pub fn run(self, check: impl FnMut(&[u8]) -> Verdict) {
        let settings = record::Settings::from_environment();
        let found = self.feed(&settings, check);
        println!("{found}");
        settings.note(&found);
    }

    fn feed(
        self,
        settings: &record::Settings,
        mut check: impl FnMut(&[u8]) -> Verdict,
    ) -> record::Found {
        let mut random = Random::new(settings.seed);
        let mut kept: Vec<Vec<u8>> = Vec::new();
        let mut met = HashSet::new();
        let mut found = record::Found::new(self.name, settings.seed);
        let longest = self.seeds.iter().map(Vec::len).max().unwrap_or(0);
        let longest = LONGEST.max(longest * 2);
        let began = Instant::now();
        for number in 0..settings.inputs {
            let input = match self
                .seeds
                .get(usize::try_from(number).unwrap_or(usize::MAX))
            {
                Some(seed) => seed.clone(),
                None => self.input(&mut random, &kept, longest),
            };
            let started = Instant::now();
            let verdict = catch_unwind(AssertUnwindSafe(|| check(&input)));
            let took = started.elapsed();
            let at = |what: &str| {
                let Self { name, .. } = self;
                format!(
                    "{name}, input {number} of seed {}: {what}\n  as text: {:?}\n  as hex: {}",
                    settings.seed,
                    String::from_utf8_lossy(&input),
                    hex(&input),
                )
            };
            let verdict = verdict.unwrap_or_else(|panic| {
                eprintln!("{}", at("the panic above"));
                resume_unwind(panic)
            });
            assert!(took < SLOWEST, "{}", at(&format!("took {took:?}")));
            found.slowest = found.slowest.max(took);
            match &verdict {
                Verdict::Taken(_) => found.taken += 1,
                Verdict::Refused(reason) => {
                    assert!(!reason.trim().is_empty(), "{}", at("refused, but not why"));
                    found.refused += 1;
                }
            }
            if met.len() < KEPT && met.insert(verdict.signature()) {
                kept.push(input);
            }
        }
        found.took = began.elapsed();
        found.ways = met.len();
        assert!(
            settings.inputs < DEFAULT_INPUTS || (found.taken > 0 && found.refused > 0),
            "{found}: a target that always says the same tests nothing"
        );
        found
    }

    fn input(&self, random: &mut Random, kept: &[Vec<u8>], longest: usize) -> Vec<u8> {
        let valid = |random: &mut Random| match &self.make {
            Some(make) if random.one_in(2) => make(random),
            _ => self.seeds[random.below(self.seeds.len())].clone(),
        };
        let begin = |random: &mut Random| {
            if kept.is_empty() || random.one_in(2) {
                valid(random)
            } else {
                // What came last came furthest, often.
                let among = if random.one_in(2) { 8 } else { KEPT };
                kept[kept.len() - 1 - random.below(among.min(kept.len()))].clone()
            }
        };
        let mut input = match random.below(16) {
            0 => valid(random),
            1 => random.bytes(256),
            2 => {
                let (first, second) = (begin(random), begin(random));
                mutate::splice(random, &first, &second)
            }
            _ => {
                let mut input = begin(random);
                // Mostly few changes: what is still nearly right comes far.
                let changes = 1 + random.below(4) * random.below(4);
                for _ in 0..changes {
                    mutate::change(random, &mut input, self.words);
                }
                input
            }
        };
        input.truncate(longest);
        input
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
