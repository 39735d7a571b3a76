//! Sysctls that capture reads or sets.

use std::fs;
use std::io;

use crate::netns::Netns;
use crate::sysctl;

const PER_DEVICE: [&str; 3] = ["rp_filter", "accept_local", "src_valid_mark"];
const GLOBAL: [&str; 3] = ["ip_forward", "tcp_fwmark_accept", "fwmark_reflect"];
/// Exists only while connection tracking is loaded, and then is 1 unless somebody changed it.
const TCP_LOOSE: &str = "net/netfilter/nf_conntrack_tcp_loose";

pub(super) fn sysctls(ns: &Netns) -> io::Result<Vec<String>> {
    let mut keys: Vec<_> = GLOBAL.map(|name| format!("net/ipv4/{name}")).into();
    for device in devices(ns)? {
        keys.extend(PER_DEVICE.map(|name| format!("net/ipv4/conf/{device}/{name}")));
    }
    keys.push(TCP_LOOSE.to_owned());
    let mut lines = Vec::new();
    for key in keys {
        match sysctl::read(ns, &key) {
            Ok(value) if key == TCP_LOOSE && value == "1" => {}
            Ok(value) => lines.push(format!("sysctl {key} = {value}")),
            // Unknown to this kernel, or the device has just gone.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(lines)
}

/// Devices by the names that sysctl knows, with `all` and `default`.
fn devices(ns: &Netns) -> io::Result<Vec<String>> {
    let entries = ns.run(|| {
        let entries = fs::read_dir("/proc/sys/net/ipv4/conf")?;
        entries.collect::<io::Result<Vec<_>>>()
    })??;
    let names = entries
        .into_iter()
        .filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.collect())
}
