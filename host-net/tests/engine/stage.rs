//! A namespace with two devices and a journal, gone when the test ends.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use host_net::dump::dump;
use host_net::engine::inspect;
use host_net::iptables::Variant;
use host_net::journal::Journal;
use host_net::netns::Netns;
use host_net::plan::{Place, Plan};

pub struct Stage {
    name: String,
    pub place: Place,
    pub journal: Journal,
    pub variant: Variant,
    dir: tempfile::TempDir,
}

impl Stage {
    /// A stage where iptables is of this variant: rules of somebody else are there already.
    pub fn new(variant: Variant) -> Self {
        let stage = Self::bare(variant);
        let suffix = match variant {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        };
        stage.sh(&format!(
            "iptables-{suffix} -t filter -A FORWARD -s 192.0.2.1/32 -j DROP
             iptables-{suffix} -t nat -A PREROUTING -s 192.0.2.1/32 -j RETURN
             ip6tables-{suffix} -t filter -A FORWARD -s 2001:db8::1/128 -j DROP"
        ));
        stage
    }

    /// A stage without any iptables table.
    pub fn bare(variant: Variant) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ambidex-engine-{}-{count}", std::process::id());
        let netns = Netns::create_named(&name).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let stage = Self {
            place: Place {
                label: "test".to_owned(),
                netns,
            },
            journal: Journal::open(dir.path().join("journal")).unwrap(),
            name,
            variant,
            dir,
        };
        stage.sh("ip link set lo up
             ip link add eth0 type veth peer name other0
             ip addr add 10.9.0.1/24 dev eth0
             ip link set eth0 up
             ip link set other0 up
             echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter");
        stage
    }

    /// Runs a script in the namespace. `iptables` is the stage's variant.
    pub fn sh(&self, script: &str) {
        let output = self.try_sh(script);
        assert!(
            output.status.success(),
            "{script}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    pub fn try_sh(&self, script: &str) -> Output {
        let suffix = match self.variant {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        };
        let names = format!(
            "set -e\niptables() {{ iptables-{suffix} \"$@\"; }}\nip6tables() {{ ip6tables-{suffix} \"$@\"; }}\n"
        );
        self.place
            .netns
            .run(|| {
                Command::new("sh")
                    .arg("-c")
                    .arg(names + script)
                    // One lock per stage, as the engine does: legacy programs would wait for each other.
                    .env("XTABLES_LOCKFILE", self.dir.path().join("xtables.lock"))
                    .output()
            })
            .unwrap()
            .unwrap()
    }

    /// The whole kernel state of the namespace as text.
    pub async fn state(&self) -> String {
        dump(&self.place.netns).await.unwrap().to_string()
    }

    pub async fn findings(&self, plan: &Plan) -> Vec<String> {
        let findings = inspect(&self.place, plan).await.unwrap();
        findings.iter().map(ToString::to_string).collect()
    }

    pub fn netns_name(&self) -> &str {
        &self.name
    }

    /// Waits until no iptables program runs in the namespace any more.
    pub async fn wait_for_iptables(&self) {
        let wanted = self.place.netns.id();
        for _ in 0..200 {
            let running = std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                use std::os::unix::fs::MetadataExt;
                let dir = entry.path();
                let name = std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
                name.contains("tables")
                    && std::fs::metadata(dir.join("ns/net"))
                        .is_ok_and(|meta| (meta.dev(), meta.ino()) == (wanted.dev, wanted.ino))
            });
            if !running {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("an iptables program does not end");
    }

    pub fn journal_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("journal")
    }

    /// Deletes the namespace's name.
    pub fn delete_netns(&self) {
        Netns::delete_named(&self.name).unwrap();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.name);
    }
}
