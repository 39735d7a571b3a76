//! What differs between any two machines, and is left out on both sides: each by a rule that says what and why.

/// A rule for the lines of one kind of command; `None` leaves the line out.
struct Rule {
    /// What it is called in the record of decisions.
    name: &'static str,
    /// Which commands' output it is for, by what they begin with.
    commands: &'static [&'static str],
    apply: fn(&str) -> Option<String>,
}

const RULES: [Rule; 9] = [
    // iproute2 puts a tab after the preference, and blanks at ends of lines.
    Rule {
        name: "white-space",
        commands: &["ip", "ss"],
        apply: |line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some(words.join(" "))
        },
    },
    // We say whose routes and rules are ours, by number; the field did not.
    Rule {
        name: "protocol",
        commands: &["ip"],
        apply: |line| Some(line.replace(" proto 133", "").trim_end().to_owned()),
    },
    // When it was listed, by which version of the tool, and how many packets it had seen until then.
    Rule {
        name: "time-and-counters",
        commands: &["iptables-save"],
        apply: |line| {
            let line = line.split(" [").next().unwrap_or(line);
            (!line.starts_with('#')).then(|| line.to_owned())
        },
    },
    // Built-in chains are the kernel's, and say nothing.
    Rule {
        name: "built-in-chains",
        commands: &["iptables-save"],
        apply: |line| {
            (!line.ends_with(" ACCEPT") || !line.starts_with(':')).then(|| line.to_owned())
        },
    },
    // A node has kube-proxy's rules and its CNI plugin's, which the articles leave out.
    Rule {
        name: "rules-of-others",
        commands: &["iptables-save"],
        apply: |line| {
            let others = [":KUBE-", " KUBE-", ":CNI-", " CNI-"];
            (!others.iter().any(|other| line.contains(other))).then(|| line.to_owned())
        },
    },
    // Numbers of devices, hardware addresses, the link-local addresses made of them, and the namespace at the other end.
    Rule {
        name: "numbers-of-devices",
        commands: &["ip a", "ip -d link"],
        apply: device,
    },
    // Attributes that later versions of the tool and of the kernel list of every device.
    Rule {
        name: "queues-and-segments",
        commands: &["ip a", "ip -d link"],
        apply: |line| {
            let rest = [" addrgenmode", " numtxqueues", " promiscuity"];
            let end = rest.iter().filter_map(|word| line.find(word)).min();
            Some(line[..end.unwrap_or(line.len())].to_owned())
        },
    },
    // The layout of a set in the memory of this kernel, and what its version prints of it.
    Rule {
        name: "memory-of-sets",
        commands: &["ipset list"],
        apply: |line| {
            let of_the_kernel = ["Revision:", "Size in memory:"];
            let line = line.split(" bucketsize").next().unwrap_or(line);
            (!of_the_kernel.iter().any(|part| line.starts_with(part))).then(|| line.to_owned())
        },
    },
    // All releases of the field made the set with comments (the pod's UID); the article's kernel or tool does not show them.
    Rule {
        name: "comments-of-sets",
        commands: &["ipset list"],
        apply: |line| Some(line.split(" comment").next().unwrap_or(line).to_owned()),
    },
];

/// Names of all rules.
pub fn names() -> impl Iterator<Item = &'static str> {
    RULES
        .iter()
        .map(|rule| rule.name)
        .chain(["order-of-members", "log-prefix"])
}

fn device(line: &str) -> Option<String> {
    let of_the_kernel = ["link/ether", "inet6 fe80"];
    if of_the_kernel.iter().any(|part| line.starts_with(part)) {
        return None;
    }
    match line.split_once(": ") {
        Some((number, rest)) if number.parse::<u32>().is_ok() => Some(rest.to_owned()),
        _ => Some(line.to_owned()),
    }
}

/// What is compared of a listing.
pub fn tidy(command: &str, text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if command == "log" {
        return lines.iter().filter_map(|line| message(line)).collect();
    }
    for rule in RULES {
        if rule.commands.iter().any(|part| command.starts_with(part)) {
            lines = lines.iter().filter_map(|line| (rule.apply)(line)).collect();
        }
    }
    lines.retain(|line| !line.is_empty() && line != "...");
    if command.starts_with("ip a") {
        lifetimes_of_known_addresses(&mut lines);
    }
    if command.starts_with("ipset list") {
        return with_sorted_members(lines);
    }
    if command.starts_with("iptables-save") {
        return by_chain(command, &lines);
    }
    lines
}

/// The line below an address that was left out goes with it: there is one for each address.
fn lifetimes_of_known_addresses(lines: &mut Vec<String>) {
    lines.dedup();
}

/// `log-prefix`: every logger writes time, level and subject in its own way.
fn message(line: &str) -> Option<String> {
    if let Some(rest) = line.split_once("\tinfo\tambient\t").map(|(_, rest)| rest) {
        return Some(rest.to_owned());
    }
    let json: serde_json::Value = serde_json::from_str(line).ok()?;
    (json["target"] == "ambient" && json["level"] == "INFO")
        .then(|| json["message"].as_str().map(str::to_owned))?
}

/// `order-of-members`: a hash has none.
fn with_sorted_members(lines: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut members: Vec<String> = Vec::new();
    for line in lines {
        if line.contains(':') {
            members.sort();
            out.append(&mut members);
            out.push(line);
        } else {
            members.push(line);
        }
    }
    members.sort();
    out.append(&mut members);
    out
}

/// Tables by name, and in each the chains by name: their rules keep their order, the order of chains means nothing.
fn by_chain(command: &str, lines: &[String]) -> Vec<String> {
    let asked = command.split_once("-t ").map_or("", |(_, table)| table);
    let mut table = asked.to_owned();
    let mut keyed: Vec<(String, String)> = Vec::new();
    for line in lines {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if line != "COMMIT" {
            let chain = match line.strip_prefix(':') {
                Some(declared) => declared.split(' ').next().unwrap_or_default(),
                None => line.split(' ').nth(1).unwrap_or_default(),
            };
            keyed.push((format!("{table} {chain}"), format!("{table} {line}")));
        }
    }
    keyed.sort_by(|a, b| a.0.cmp(&b.0));
    keyed.into_iter().map(|(_, line)| line).collect()
}
