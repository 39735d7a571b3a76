//! Whether this machine can carry a capture: a collector of [`Facts`], and a pure function from facts to findings.
//!
//! Every check is an entry of the [`catalogue`]: its identifier, the captures that it concerns, why it matters and what
//! mends it stand beside the function that looks. Collecting changes nothing on the machine; what a kernel can do is tried in
//! network namespaces that exist only for that.

pub mod catalogue;
mod clashes;
pub mod collect;
mod daemons;
pub mod facts;
mod filters;
pub mod findings;
mod kernel;
mod machine;
mod network;

pub use facts::Facts;
pub(crate) use filters::mesh_of;
pub use findings::{Finding, Findings, Recommendation, Severity, recommended};

/// Looks at facts: for each check what it found, or one finding that all is well.
pub fn evaluate(facts: &Facts) -> Findings {
    let findings = catalogue::all().flat_map(|check| {
        let found = (check.look)(facts);
        let finding = |severity, modes: &[_]| Finding {
            id: check.id.to_owned(),
            check: check.title.to_owned(),
            severity,
            modes: modes.to_vec(),
            object: String::new(),
            found: String::new(),
            why: String::new(),
            fix: String::new(),
        };
        if found.is_empty() {
            return vec![finding(Severity::Ok, check.modes)];
        }
        let told = found.into_iter().map(|found| Finding {
            why: check.why.to_owned(),
            fix: check.fix.replace("OBJECT", &found.object),
            object: found.object,
            found: found.what,
            ..finding(found.severity, found.modes.unwrap_or(check.modes))
        });
        told.collect()
    });
    Findings {
        findings: findings.collect(),
    }
}
