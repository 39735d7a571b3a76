//! Where the daemons of one node meet: its run directory (sockets) and its state directory (journal).

use std::path::{Path, PathBuf};

/// Environment variable that names the run directory.
pub const RUN_DIR_ENV: &str = "AMBIDEX_RUN_DIR";
/// Environment variable that names the state directory.
pub const STATE_DIR_ENV: &str = "AMBIDEX_STATE_DIR";

/// Sockets of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The directory itself.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// From the environment, by default `/var/run/ambidex`.
    pub fn from_env() -> Self {
        Self(
            std::env::var_os(RUN_DIR_ENV)
                .map_or_else(|| PathBuf::from("/var/run/ambidex"), PathBuf::from),
        )
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// ZDS, on which the agent listens and the proxy connects. The field's variables win: `ZTUNNEL_UDS_ADDRESS` on the
    /// agent, `INPOD_UDS` on the proxy.
    pub fn zds(&self, variable: &str) -> PathBuf {
        std::env::var_os(variable).map_or_else(|| self.0.join("ztunnel.sock"), PathBuf::from)
    }

    /// Admin pages of the node's proxies: one socket each, in a directory beside their ZDS socket.
    pub fn proxies(zds: &Path) -> PathBuf {
        zds.with_file_name("proxies")
    }

    /// Events of the CNI plugin.
    pub fn plugin_events(&self) -> PathBuf {
        self.0.join("pluginevent.sock")
    }

    /// Log lines of the CNI plugin.
    pub fn plugin_log(&self) -> PathBuf {
        self.0.join("log.sock")
    }

    /// The agent's API for the command line.
    pub fn agent(&self) -> PathBuf {
        self.0.join("agent.sock")
    }
}

/// State directory from the environment, by default `/var/lib/ambidex`.
pub fn state_dir() -> PathBuf {
    std::env::var_os(STATE_DIR_ENV).map_or_else(|| PathBuf::from("/var/lib/ambidex"), PathBuf::from)
}
