//! `ambidex cni install` and `uninstall`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, block_on};
use crate::cni::install::{Form, InstallError, Installation, PLUGIN_TYPE};
use crate::logging;
use crate::run_dir::RunDir;

/// Time between two looks at what is installed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// An installation that does not last as long as this is being fought over.
const LASTS: Duration = Duration::from_secs(60);
/// Times in a row that somebody may take the plugin out before it is said how to end that.
const PATIENCE: u32 = 5;

#[derive(Debug, Args)]
pub(crate) struct CniArgs {
    #[command(subcommand)]
    command: CniCommand,
}

#[derive(Debug, Subcommand)]
enum CniCommand {
    /// Put the plugin into the directories of a container runtime and its network configuration
    Install(Box<InstallArgs>),
    /// Take the plugin out again
    Uninstall(Places),
}

/// Directories of the container runtime.
#[derive(Debug, Args)]
struct Places {
    /// Directory of CNI plugins; may be given several times
    #[arg(long, value_name = "PATH", default_value = "/opt/cni/bin")]
    bin_dir: Vec<PathBuf>,
    /// Directory of network configurations
    #[arg(long, value_name = "PATH", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
}

/// Which sandboxes of the network are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CaptureWord {
    /// Pods of Kubernetes.
    Labels,
    /// Every sandbox.
    Always,
}

#[derive(Debug, Args)]
struct InstallArgs {
    #[command(flatten)]
    places: Places,
    /// Name of the configuration to be used (default: the first valid one)
    #[arg(long, env = "CNI_CONF_NAME", value_name = "FILE")]
    conf_name: Option<String>,
    /// Whether the plugin is put into a chain; otherwise into a file of its own that others refer to
    #[arg(long, env = "CHAINED_CNI_PLUGIN", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    chained: bool,
    /// Leave the network's configuration alone and put a copy with the plugin before it
    #[arg(long)]
    owned: bool,
    /// The plugin (default: the one beside this program)
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// Stay, wait for a network configuration if there is none, and put the plugin in again when somebody takes it out
    #[arg(long)]
    watch: bool,
    /// Namespaces whose pods are never captured
    #[arg(
        long,
        env = "EXCLUDE_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    exclude_namespaces: Vec<String>,
    /// Namespace of the agent's and the proxy's own pods
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME")]
    pod_namespace: Option<String>,
    /// Which sandboxes are captured
    #[arg(long, value_enum, default_value_t = CaptureWord::Labels)]
    capture: CaptureWord,
    /// With --capture always: namespace of the sandboxes
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Service account of sandboxes of which the runtime says none
    #[arg(long, value_name = "NAME")]
    service_account: Option<String>,
}

impl InstallArgs {
    fn installation(self) -> anyhow::Result<Installation> {
        let plugin = match self.plugin {
            Some(plugin) => plugin,
            None => std::env::current_exe()?.with_file_name(PLUGIN_TYPE),
        };
        let mut settings = json!({
            "cni_agent_run_dir": RunDir::from_env().path(),
            "ambient_enabled": true,
            "exclude_namespaces": self.exclude_namespaces,
        });
        if let Some(namespace) = self.pod_namespace {
            settings["pod_namespace"] = json!(namespace);
        }
        let own = [
            (
                "capture",
                (self.capture == CaptureWord::Always).then(|| "always".to_owned()),
            ),
            ("namespace", self.namespace),
            ("serviceAccount", self.service_account),
        ];
        for (key, value) in own {
            if let Some(value) = value {
                settings["ambidex"][key] = Value::String(value);
            }
        }
        Ok(Installation {
            plugin,
            bin_dirs: self.places.bin_dir,
            conf_dir: self.places.conf_dir,
            conf_name: self.conf_name,
            form: match (self.chained, self.owned) {
                (true, false) => Form::Chained,
                (true, true) => Form::Owned,
                (false, _) => Form::Standalone,
            },
            settings,
        })
    }
}

pub(crate) fn run(args: CniArgs) -> Result<(), Failure> {
    match args.command {
        CniCommand::Install(args) => {
            let watched = args.watch;
            let installation = args.installation()?;
            if watched {
                let _log = logging::start()?;
                return Ok(block_on(watch(&installation))??);
            }
            report(&installation.ensure()?, "everything was in place")
        }
        CniCommand::Uninstall(places) => {
            let installation = Installation {
                plugin: PathBuf::new(),
                bin_dirs: places.bin_dir,
                conf_dir: places.conf_dir,
                conf_name: None,
                form: Form::Chained,
                settings: Value::Null,
            };
            report(&installation.remove()?, "nothing was installed")
        }
    }
}

fn report(done: &[String], nothing: &str) -> Result<(), Failure> {
    let mut text = done.join("\n");
    if text.is_empty() {
        text = nothing.to_owned();
    }
    super::output::print(&format!("{text}\n"))?;
    Ok(())
}

/// Keeps the plugin installed until SIGTERM or SIGINT. It stays when this ends: an upgrade is no reason to let pods start
/// uncaptured.
async fn watch(installation: &Installation) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut installed: Option<Instant> = None;
    let mut overwritten = 0;
    let mut trouble = String::new();
    loop {
        match installation.ensure() {
            Ok(done) if done.is_empty() => trouble.clear(),
            Ok(done) => {
                overwritten = match installed {
                    Some(when) if when.elapsed() < LASTS => overwritten + 1,
                    _ => 0,
                };
                tracing::info!(done = done.join("; "), "the plugin is installed");
                if overwritten >= PATIENCE {
                    tracing::warn!(
                        times = overwritten,
                        "something keeps taking the plugin out: with Cilium set cni.exclusive=false, or install with --owned"
                    );
                }
                installed = Some(Instant::now());
                trouble.clear();
            }
            // Said once, and again when it is another.
            Err(error) if error.to_string() == trouble => {}
            Err(error @ InstallError::NoNetwork(_)) => {
                tracing::info!(%error, "waiting");
                trouble = error.to_string();
            }
            Err(error) => {
                tracing::error!(%error, "the plugin is not installed");
                trouble = error.to_string();
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}
