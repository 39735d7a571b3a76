//! `ambidex bug-report`: one archive for whoever looks at this node from afar.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;

use super::output::print;
use super::{Failure, block_on};
use crate::bug_report::{self, Request};
use crate::calendar;
use crate::doctor::collect::Sources;

#[derive(Debug, Args)]
pub(crate) struct BugReportArgs {
    /// Where to write the archive [default: ambidex-bug-report-TIME.tar.gz]
    #[arg(long, value_name = "FILE.tar.gz")]
    out: Option<PathBuf>,
    /// A log to put in beside those that are found; several may be given
    #[arg(long = "log", value_name = "FILE")]
    logs: Vec<PathBuf>,
    /// Directory of the container runtime's network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Directory of the built-in CA: its certificates are taken, its keys are kept out of everything
    #[arg(
        long,
        value_name = "DIR",
        env = "AMBIDEX_CA_DIR",
        default_value = "/var/lib/ambidex/ca"
    )]
    ca_dir: PathBuf,
}

pub(crate) fn run(args: BugReportArgs) -> Result<(), Failure> {
    let out = args.out.unwrap_or_else(|| {
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let time = calendar::date(seconds).replace([':', '-'], "");
        PathBuf::from(format!("ambidex-bug-report-{time}.tar.gz"))
    });
    let request = Request {
        sources: Sources::from_env(args.cni_conf_dir),
        ca_dir: args.ca_dir,
        logs: args.logs,
    };
    let told = |name: &str, missing: Option<&str>| match missing {
        None => eprintln!("√ {name}"),
        Some(why) => eprintln!("× {name}: {why}"),
    };
    let outcome = block_on(bug_report::write(&request, &out, told))??;
    print(&format!(
        "{}: {} files, {} missing; keys and tokens are left out, names and addresses are not\n",
        out.display(),
        outcome.taken.len(),
        outcome.missing.len()
    ))?;
    Ok(())
}
