//! Profiles of this process: processor time by interrupting its threads, memory by asking its allocator.

mod format;

use std::time::{Duration, SystemTime};

use shared_proxy::telemetry::admin::{ProfileError, Profiler};

/// Shared objects whose code is not sampled: the stack cannot be read safely while it is being unwound, or in the kernel's
/// own page. The C library is sampled, because that is where a system call returns to, and most of a proxy's time is there.
const NOT_SAMPLED: [&str; 2] = ["libgcc", "vdso"];

/// What makes the allocator keep account; it is read when the process starts.
#[cfg(feature = "jemalloc")]
const HEAP_ADVICE: &str = "the allocator keeps no account of who allocates: start the proxy with \
    _RJEM_MALLOC_CONF=prof:true,prof_active:true,lg_prof_sample:19 in its environment";
#[cfg(not(feature = "jemalloc"))]
const HEAP_ADVICE: &str = "this build uses the C library's allocator, which cannot say who allocated what: \
    a build with the feature `jemalloc` can";

/// Profiles this process.
pub(super) struct ThisProcess;

impl Profiler for ThisProcess {
    fn cpu(&self, time: Duration, frequency: u32) -> Result<Vec<u8>, ProfileError> {
        let failed = |error: pprof::Error| ProfileError::Failed(format!("profile: {error}"));
        let began = SystemTime::now();
        let guard = pprof::ProfilerGuardBuilder::default()
            .frequency(i32::try_from(frequency).unwrap_or(i32::MAX))
            .blocklist(&NOT_SAMPLED)
            .build()
            .map_err(failed)?;
        std::thread::sleep(time);
        let report = guard.report().build().map_err(failed)?;
        drop(guard);
        Ok(format::cpu(&report, began, time, frequency))
    }

    #[cfg(feature = "jemalloc")]
    fn heap(&self) -> Result<Vec<u8>, ProfileError> {
        let unavailable = || ProfileError::Unavailable(HEAP_ADVICE.to_owned());
        let control = jemalloc_pprof::PROF_CTL.as_ref().ok_or_else(unavailable)?;
        let mut control = control.blocking_lock();
        if !control.activated() {
            return Err(unavailable());
        }
        // Goes through a file in the directory for temporary ones.
        control
            .dump_pprof()
            .map_err(|error| ProfileError::Failed(format!("heap profile: {error:#}")))
    }

    #[cfg(not(feature = "jemalloc"))]
    fn heap(&self) -> Result<Vec<u8>, ProfileError> {
        Err(ProfileError::Unavailable(HEAP_ADVICE.to_owned()))
    }
}
