//! Profiles of the running process, for `go tool pprof` and whatever else reads its format.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::Semaphore;

use super::pages::{Answer, Query, binary, parameter, text};

/// Longest time that a profile is taken for. Readers ask for 30 s by themselves.
pub(super) const LONGEST: Duration = Duration::from_secs(60);
/// The field's default.
const SECONDS: u64 = 10;
/// The field's default, in samples per second of processor time.
const FREQUENCY: u64 = 100;
/// A sample costs some 10 µs of the thread that is interrupted.
const FREQUENCIES: RangeInclusive<u64> = 1..=1000;

/// Takes profiles of the process. Both methods block, on a thread that is there for it.
pub trait Profiler: Send + Sync + 'static {
    /// Where the process spends its processor time during `time`, sampled `frequency` times in each second of it: a
    /// `perftools.profiles.Profile`.
    ///
    /// # Errors
    /// See [`ProfileError`].
    fn cpu(&self, time: Duration, frequency: u32) -> Result<Vec<u8>, ProfileError>;

    /// Who allocated the memory that is in use, in the same format.
    ///
    /// # Errors
    /// See [`ProfileError`].
    fn heap(&self) -> Result<Vec<u8>, ProfileError>;
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// This process cannot take one, as it was built or started. Says what would help.
    #[error("{0}")]
    Unavailable(String),
    /// Taking it failed.
    #[error("{0}")]
    Failed(String),
}

/// What is profiled.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Cpu,
    Heap,
}

/// A profiler that takes one profile at a time: a second one would count the work of the first.
pub(super) struct Profiles {
    profiler: Arc<dyn Profiler>,
    place: Arc<Semaphore>,
}

impl Profiles {
    pub(super) fn new(profiler: impl Profiler) -> Self {
        Self {
            profiler: Arc::new(profiler),
            place: Arc::new(Semaphore::new(1)),
        }
    }

    /// Takes a profile. It goes on when nobody waits for the answer any more.
    pub(super) async fn answer(&self, kind: Kind, query: &Query) -> Answer {
        let within = |name: &str, default: u64, allowed: RangeInclusive<u64>| {
            let Some(given) = parameter(&query.text, name) else {
                return Ok(default);
            };
            match given.parse() {
                Ok(number) if allowed.contains(&number) => Ok(number),
                _ => Err(format!(
                    "{name}={given}: want a whole number from {} to {}\n",
                    allowed.start(),
                    allowed.end()
                )),
            }
        };
        let asked = within("seconds", SECONDS, 1..=LONGEST.as_secs())
            .and_then(|seconds| Ok((seconds, within("frequency", FREQUENCY, FREQUENCIES)?)));
        let (seconds, frequency) = match asked {
            Ok(asked) => asked,
            Err(wrong) => return text(StatusCode::BAD_REQUEST, wrong),
        };
        let Ok(place) = Arc::clone(&self.place).try_acquire_owned() else {
            return text(
                StatusCode::TOO_MANY_REQUESTS,
                "a profile is being taken, and there is one at a time\n",
            );
        };
        let profiler = Arc::clone(&self.profiler);
        let taken = tokio::task::spawn_blocking(move || {
            let _place = place;
            match kind {
                Kind::Cpu => {
                    let frequency = u32::try_from(frequency).unwrap_or(u32::MAX);
                    profiler.cpu(Duration::from_secs(seconds), frequency)
                }
                Kind::Heap => profiler.heap(),
            }
        });
        match taken.await {
            Ok(Ok(profile)) => binary(profile),
            Ok(Err(error @ ProfileError::Unavailable(_))) => {
                text(StatusCode::NOT_IMPLEMENTED, format!("{error}\n"))
            }
            Ok(Err(error @ ProfileError::Failed(_))) => {
                text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
            }
            Err(panicked) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{panicked}\n")),
        }
    }
}
