//! What the field's node proxy reads from its environment, each a flag here: same names, same meaning, same defaults. What
//! a variable that is not here would have meant is told in docs/compatibility.md.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{ArgAction, Args, ValueEnum};
use serde_json::{Value, json};
use shared_proxy::core::{CoreConfig, Keepalive};
use shared_proxy::dns::{DnsConfig, ResolvConf};
use shared_proxy::identity;
use shared_proxy::pool::PoolConfig;

use super::duration;

/// Time that a pod's end leaves unused, so that the proxy is not killed while it cuts what is left.
const GRACE_RESERVE: Duration = Duration::from_secs(5);

/// The mark of the proxy's own packets in a pod (0x539), which the rules of both captures know.
const PACKET_MARK: u32 = 1337;

/// A proxy for a node, or for one workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProxyMode {
    /// For all captured pods of a node.
    Shared,
    /// For one workload without an agent.
    Dedicated,
}

/// What TLS is restricted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompliancePolicy {
    /// Post-quantum key exchange only: X25519MLKEM768.
    Pqc,
    /// Cryptography of a module that is validated for FIPS 140-3, which a build with the feature `fips` always uses; the
    /// word is the field's.
    #[value(name = "fips-140-2", alias = "fips-140-3")]
    Fips,
}

impl CompliancePolicy {
    /// The word used in flags and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pqc => "pqc",
            Self::Fips => "fips-140-2",
        }
    }
}

/// Flags of the field's environment variables, those of its control plane apart.
#[derive(Debug, Clone, Args)]
pub struct FieldArgs {
    /// Whether the proxy serves a node or one workload
    #[arg(long, env = "PROXY_MODE", value_enum, ignore_case = true, default_value_t = ProxyMode::Shared)]
    pub proxy_mode: ProxyMode,
    /// Domain of the cluster
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Streams in one tunnel; the next one gets another tunnel
    #[arg(
        long,
        env = "POOL_MAX_STREAMS_PER_CONNECTION",
        value_name = "N",
        default_value_t = 100
    )]
    pub pool_max_streams: u16,
    /// How long a tunnel without streams is kept
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", value_name = "DURATION", default_value = "5m", value_parser = duration::parse)]
    pub pool_unused_release: Duration,
    /// Whether TCP keepalive is on
    #[arg(long, env = "KEEPALIVE_ENABLED", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub keepalive: bool,
    /// Silence before the first keepalive probe
    #[arg(long, env = "KEEPALIVE_TIME", value_name = "DURATION", default_value = "180s", value_parser = duration::parse)]
    pub keepalive_time: Duration,
    /// Time between two keepalive probes
    #[arg(long, env = "KEEPALIVE_INTERVAL", value_name = "DURATION", default_value = "180s", value_parser = duration::parse)]
    pub keepalive_interval: Duration,
    /// Unanswered keepalive probes before a connection counts as dead
    #[arg(long, env = "KEEPALIVE_RETRIES", value_name = "N", default_value_t = 9)]
    pub keepalive_retries: u32,
    /// Whether unacknowledged data ends a connection after as long as silence does (TCP_USER_TIMEOUT)
    #[arg(long, env = "USER_TIMEOUT_ENABLED", value_name = "BOOL", default_value_t = false, action = ArgAction::Set)]
    pub user_timeout: bool,
    /// How long a connection may be silent of which one end has ended its direction; 0s: for ever
    #[arg(long, env = "AMBIDEX_HALF_OPEN_TIMEOUT", value_name = "DURATION", default_value = "1h", value_parser = duration::parse)]
    pub half_open_timeout: Duration,
    /// How long connections may go on after SIGTERM (default: what the grace period of the pod leaves)
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_name = "DURATION", value_parser = duration::parse)]
    pub termination_deadline: Option<Duration>,
    /// Grace period of the proxy's own pod, in seconds
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS", value_name = "SECONDS")]
    pub termination_grace_period: Option<u64>,
    /// Lifetime that is asked for workload certificates
    #[arg(long, env = "SECRET_TTL", value_name = "DURATION", default_value = "24h", value_parser = duration::parse)]
    pub secret_ttl: Duration,
    /// Whether the proxy answers DNS queries on port 15053
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub dns_proxy: bool,
    /// Whether pods that are captured in their namespace may ask for connections by SOCKS5 at 127.0.0.1:15080
    #[arg(long, env = "UNSTABLE_ENABLE_SOCKS5", value_name = "BOOL", default_value_t = false, action = ArgAction::Set)]
    pub socks5: bool,
    /// Namespace whose service a hostname means when several have it and the client's namespace does not
    // The spelling is the field's.
    #[arg(long, env = "PREFERED_SERVICE_NAMESPACE", value_name = "NAMESPACE")]
    pub preferred_service_namespace: Option<String>,
    /// Whether names have IPv6 addresses
    #[arg(long, env = "IPV6_ENABLED", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub ipv6: bool,
    /// Whether answers to tunnels' peers say who the destination is
    #[arg(long, env = "ENABLE_RESPONSE_BAGGAGE", value_name = "BOOL", default_value_t = false, action = ArgAction::Set)]
    pub response_baggage: bool,
    /// Whether application tunnels end at the pod's loopback address, where the capture reaches it
    #[arg(long, env = "LOCALHOST_APP_TUNNEL", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub localhost_app_tunnel: bool,
    /// Whether what policies say of each connection is logged at INFO, not at DEBUG
    #[arg(long, env = "AUTHZ_POLICY_INFO_LOGGING", value_name = "BOOL", default_value_t = false, action = ArgAction::Set)]
    pub policy_info_logging: bool,
    /// What TLS is restricted to; peers that cannot do it are refused
    #[arg(long, env = "COMPLIANCE_POLICY", value_enum)]
    pub compliance_policy: Option<CompliancePolicy>,
    /// Mark of the proxy's own packets in a pod; no other than 1337, which the agent's rules let pass
    #[arg(long, env = "PACKET_MARK", value_name = "MARK", default_value_t = PACKET_MARK)]
    pub packet_mark: u32,
    /// Whether applications see the clients' addresses; they always do
    #[arg(long, env = "ENABLE_ORIG_SRC", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub original_source: bool,
    /// Whether two proxies may serve a pod while one replaces the other; they always may
    #[arg(long, env = "INPOD_PORT_REUSE", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub port_reuse: bool,
    /// File that names the resolvers for what the mesh does not know
    #[arg(
        long,
        env = "AMBIDEX_RESOLV_CONF",
        value_name = "FILE",
        default_value = "/etc/resolv.conf"
    )]
    pub resolv_conf: PathBuf,
}

impl FieldArgs {
    /// Fails for what this proxy does not do, by the name of the variable.
    ///
    /// # Errors
    /// Says why.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.proxy_mode == ProxyMode::Dedicated {
            bail!(
                "PROXY_MODE=dedicated (--proxy-mode dedicated): this proxy serves the pods that an agent announces; a proxy for one workload is not part of it"
            );
        }
        for (name, duration) in [
            ("KEEPALIVE_TIME", self.keepalive_time),
            ("KEEPALIVE_INTERVAL", self.keepalive_interval),
        ] {
            if self.keepalive && duration < Duration::from_secs(1) {
                bail!("{name}: the kernel counts in seconds, so no less than 1s");
            }
        }
        if self.packet_mark != PACKET_MARK {
            bail!(
                "PACKET_MARK={}: packets with another mark than {PACKET_MARK} would be captured again by the agent's rules",
                self.packet_mark
            );
        }
        if !self.original_source {
            bail!(
                "ENABLE_ORIG_SRC=false: this proxy always keeps the clients' addresses, policies rely on them"
            );
        }
        if !self.port_reuse {
            bail!(
                "INPOD_PORT_REUSE=false: this proxy always shares its ports in a pod with the one that replaces it"
            );
        }
        if self.compliance_policy == Some(CompliancePolicy::Fips) {
            identity::require_fips().context("COMPLIANCE_POLICY=fips-140-2")?;
        }
        if self.pool_max_streams == 0 {
            bail!("POOL_MAX_STREAMS_PER_CONNECTION: no less than 1");
        }
        Ok(())
    }

    /// Restricts TLS, in the whole process and before its first use.
    ///
    /// # Errors
    /// This build cannot do what is required.
    pub fn require_compliance(&self) -> anyhow::Result<()> {
        if cfg!(feature = "fips") {
            identity::require_fips()?;
        }
        if self.compliance_policy == Some(CompliancePolicy::Pqc) {
            identity::require_post_quantum().context("COMPLIANCE_POLICY=pqc")?;
        }
        Ok(())
    }

    /// How long connections may go on after SIGTERM.
    pub fn drain(&self) -> Duration {
        let of_grace = |seconds: u64| {
            let grace = Duration::from_secs(seconds);
            if grace > 2 * GRACE_RESERVE {
                grace - GRACE_RESERVE
            } else {
                let second = Duration::from_secs(1);
                grace.saturating_sub(second).max(second)
            }
        };
        self.termination_deadline
            .or_else(|| self.termination_grace_period.map(of_grace))
            .unwrap_or(Duration::from_secs(5))
    }

    /// These settings in a configuration of the core.
    pub fn apply(&self, core: CoreConfig) -> CoreConfig {
        let silence = self.keepalive_time + self.keepalive_interval * self.keepalive_retries;
        CoreConfig {
            keepalive: self.keepalive.then_some(Keepalive {
                time: self.keepalive_time,
                interval: self.keepalive_interval,
                retries: self.keepalive_retries,
            }),
            user_timeout: self.user_timeout.then_some(silence),
            half_open_timeout: (!self.half_open_timeout.is_zero())
                .then_some(self.half_open_timeout),
            pool: PoolConfig {
                max_streams_per_connection: usize::from(self.pool_max_streams),
                idle_release: self.pool_unused_release,
            },
            response_baggage: self.response_baggage,
            localhost_app_tunnel: self.localhost_app_tunnel,
            policy_info_logging: self.policy_info_logging,
            dns: self.dns_proxy.then(|| Arc::new(self.dns())),
            socks5: self.socks5.then(|| Arc::new(self.names())),
            ..core
        }
    }

    /// How names of the mesh are meant.
    fn names(&self) -> DnsConfig {
        DnsConfig {
            domain: self.cluster_domain.to_ascii_lowercase().into(),
            preferred_namespace: self.preferred_service_namespace.as_deref().map(Arc::from),
            ipv6: self.ipv6,
            ..DnsConfig::default()
        }
    }

    fn dns(&self) -> DnsConfig {
        let config = self.names();
        match ResolvConf::load(&self.resolv_conf) {
            Ok(resolvers) => config.with_resolvers(&resolvers),
            Err(error) => {
                // Names of the mesh have answers all the same.
                tracing::warn!(%error, "DNS queries for names outside the mesh are answered with SERVFAIL");
                config
            }
        }
    }

    /// What is in force, for the section `config` of the configuration dump.
    pub fn describe(&self, core: &CoreConfig, drain: Duration, secret_ttl: Duration) -> Value {
        let text = |duration: Duration| format!("{duration:?}");
        json!({
            "trustDomain": &*core.trust_domain,
            "clusterId": &*core.cluster,
            "network": &*core.network,
            "connectionTerminationDeadline": text(drain),
            "secretTtl": text(secret_ttl),
            "compliancePolicy": self.compliance_policy.map(CompliancePolicy::as_str),
            "poolMaxStreamsPerConnection": core.pool.max_streams_per_connection,
            "poolUnusedReleaseTimeout": text(core.pool.idle_release),
            "keepalive": core.keepalive.as_ref().map(|keepalive| json!({
                "time": text(keepalive.time),
                "interval": text(keepalive.interval),
                "retries": keepalive.retries,
            })),
            "responseBaggage": core.response_baggage,
            "localhostAppTunnel": core.localhost_app_tunnel,
            "authzPolicyInfoLogging": core.policy_info_logging,
            "userTimeout": core.user_timeout.map(text),
            "halfOpenTimeout": core.half_open_timeout.map(text),
            "socks5": core.socks5.is_some(),
            "dns": core.dns.as_ref().map(|dns| json!({
                "clusterDomain": &*dns.domain,
                "preferredServiceNamespace": dns.preferred_namespace.as_deref(),
                "ipv6": dns.ipv6,
                "upstreams": dns.upstreams,
                "upstreamTimeout": text(dns.upstream_timeout),
                "attempts": dns.attempts,
            })),
        })
    }
}
