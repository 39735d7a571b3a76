//! What a client may have meant by a name: itself, a service of the cluster, or either behind a search domain.
//!
//! A resolver with `ndots:5` asks for `web.example.com.alpha.svc.cluster.local` before `web.example.com`. Taking the search
//! domain off here answers the first of these questions, and saves the rest of the round.
//!
//! Names are lower-case text without the last dot.

/// One meaning of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meaning {
    /// The name that was meant.
    pub name: String,
    /// Set when a search domain was taken off: the name without it, to which the name asked for is an alias.
    pub stripped: Option<String>,
}

/// The meanings of `asked` to a client in `namespace`, the first one first, each once.
pub fn meanings(asked: &str, namespace: &str, domain: &str) -> Vec<Meaning> {
    let services = format!("svc.{domain}");
    let own = format!("{namespace}.{services}");
    let mut found = Vec::new();
    add(&mut found, asked.to_owned(), None);
    if let Some(name) = in_cluster(asked, &own, &services, domain) {
        add(&mut found, name, None);
    }
    for search in [own.as_str(), &services, domain] {
        let Some(stripped) = strip(asked, search) else {
            continue;
        };
        add(&mut found, stripped.to_owned(), Some(stripped));
        if let Some(name) = in_cluster(stripped, &own, &services, domain) {
            add(&mut found, name, Some(stripped));
        }
    }
    found
}

fn add(found: &mut Vec<Meaning>, name: String, stripped: Option<&str>) {
    if !found.iter().any(|meaning| meaning.name == name) {
        found.push(Meaning {
            name,
            stripped: stripped.map(str::to_owned),
        });
    }
}

/// `name` without `.search` behind it.
fn strip<'a>(name: &'a str, search: &str) -> Option<&'a str> {
    name.strip_suffix(search)?
        .strip_suffix('.')
        .filter(|rest| !rest.is_empty())
}

/// A short name as a service of the cluster: `web`, `web.alpha` or `web.alpha.svc`.
fn in_cluster(name: &str, own: &str, services: &str, domain: &str) -> Option<String> {
    let labels: Vec<&str> = name.split('.').collect();
    match labels[..] {
        [_] => Some(format!("{name}.{own}")),
        [_, _] => Some(format!("{name}.{services}")),
        [_, _, "svc"] => Some(format!("{name}.{domain}")),
        _ => None,
    }
}

/// `name` and the wildcards that cover it, the narrowest first: `a.b.c`, `*.b.c`, `*.c`.
pub fn with_wildcards(name: &str) -> impl Iterator<Item = String> + '_ {
    let wildcards = name
        .match_indices('.')
        .map(|(dot, _)| format!("*{}", &name[dot..]));
    std::iter::once(name.to_owned()).chain(wildcards)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Each meaning as `name` or `name<stripped`.
    fn of(asked: &str) -> Vec<String> {
        meanings(asked, "alpha", "cluster.local")
            .into_iter()
            .map(|meaning| match meaning.stripped {
                Some(stripped) => format!("{}<{stripped}", meaning.name),
                None => meaning.name,
            })
            .collect()
    }

    #[rstest::rstest]
    #[case::service("web", &["web", "web.alpha.svc.cluster.local"])]
    #[case::with_namespace("web.beta", &["web.beta", "web.beta.svc.cluster.local"])]
    #[case::with_svc("web.beta.svc", &["web.beta.svc", "web.beta.svc.cluster.local"])]
    #[case::external("www.example.com", &["www.example.com"])]
    #[case::own_search_domain("www.example.com.alpha.svc.cluster.local",
        &["www.example.com.alpha.svc.cluster.local", "www.example.com<www.example.com",
          "www.example.com.alpha<www.example.com.alpha", "www.example.com.alpha.svc<www.example.com.alpha.svc"])]
    #[case::full_name("web.beta.svc.cluster.local",
        &["web.beta.svc.cluster.local", "web.beta<web.beta", "web.beta.svc<web.beta.svc"])]
    #[case::nothing_before_the_search_domain("svc.cluster.local",
        &["svc.cluster.local", "svc<svc", "svc.alpha.svc.cluster.local<svc"])]
    #[case::no_label_boundary("xcluster.local", &["xcluster.local", "xcluster.local.svc.cluster.local"])]
    fn meanings_of(#[case] asked: &str, #[case] want: &[&str]) {
        assert_eq!(of(asked), want);
    }

    #[test]
    fn wildcards_from_narrow_to_wide() {
        let all: Vec<_> = with_wildcards("a.b.c").collect();
        assert_eq!(all, ["a.b.c", "*.b.c", "*.c"]);
        let all: Vec<_> = with_wildcards("a").collect();
        assert_eq!(all, ["a"]);
    }
}
