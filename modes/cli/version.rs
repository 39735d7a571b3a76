//! `ambidex version`: what this program is, and what it was built with.

use std::sync::LazyLock;

use clap::Args;
use comfy_table::Table;
use serde::Serialize;
use shared_proxy::identity;

use super::Failure;
use super::output::{OutputArgs, plain_table};

#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Version {
    version: &'static str,
    /// What TLS runs on.
    tls: &'static str,
    /// Whether that is a module validated for FIPS 140-3, in force.
    fips: bool,
    kubernetes: bool,
}

impl Version {
    fn this() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            tls: identity::describe_provider(),
            fips: identity::is_fips(),
            kubernetes: cfg!(feature = "kubernetes"),
        }
    }

    fn table(&self) -> Table {
        let mut shown = plain_table(&["VERSION", "TLS", "FIPS", "KUBERNETES"]);
        let word = |yes: bool| if yes { "yes" } else { "no" };
        shown.add_row([
            self.version,
            self.tls,
            word(self.fips),
            word(self.kubernetes),
        ]);
        shown
    }
}

/// What `--version` says after the program's name.
pub(super) fn line() -> &'static str {
    static LINE: LazyLock<String> = LazyLock::new(|| {
        let Version { version, tls, .. } = Version::this();
        format!("{version} (TLS: {tls})")
    });
    &LINE
}

pub(crate) fn run(args: VersionArgs) -> Result<(), Failure> {
    let version = Version::this();
    args.output.print(&version, |_| version.table())?;
    Ok(())
}
