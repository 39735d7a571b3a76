//! The C library, through the `ipset` crate, as a second implementation of sets: what one writes the other reads, and
//! the same operations leave the same sets. Needs root, libipset-dev and libclang-dev.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use host_net::ipset::{Ipset, Made, Removal};
use host_net::netns::Netns;
use host_net::plan::{Member, Set};
use ipset::Session;
use ipset::types::{AddOption, EnvOption, HashIp};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;

/// The library keeps its types in global variables.
static LIBRARY: Mutex<()> = Mutex::new(());

/// Runs inside a namespace of its own: a session of the library belongs to the one where it gave its first command.
fn in_a_fresh_netns(f: impl FnOnce(&Ipset)) {
    let _alone = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    let netns = Netns::create_unnamed().unwrap();
    netns.run(|| f(&Ipset::open(&netns).unwrap())).unwrap();
}

/// A set as the library sees it.
struct Library {
    session: Session<HashIp>,
    name: String,
    files: TempDir,
}

impl Library {
    fn new(name: &str) -> Self {
        let mut session = Session::new(name.to_owned());
        // As `ipset -exist add`: an entry that exists gets the comment.
        session.set_option(EnvOption::Exist);
        Self {
            session,
            name: name.to_owned(),
            files: tempfile::tempdir().unwrap(),
        }
    }

    fn create(&mut self, comments: bool) {
        self.session.unset_option(EnvOption::Exist);
        let created = self.session.create(|builder| {
            let builder = builder.with_ipv6(false)?;
            let builder = if comments {
                builder.with_comment()?
            } else {
                builder
            };
            builder.build()
        });
        assert!(created.unwrap());
        self.session.set_option(EnvOption::Exist);
    }

    fn add(&mut self, ip: Ipv4Addr, comment: Option<&str>) {
        let comment = comment.map(|text| AddOption::Comment(text.to_owned()));
        let options: Vec<AddOption> = comment.into_iter().collect();
        self.session.add(IpAddr::V4(ip), &options).unwrap();
    }

    fn del(&mut self, ip: Ipv4Addr) {
        self.session.del(IpAddr::V4(ip)).unwrap();
    }

    fn test(&mut self, ip: Ipv4Addr) -> bool {
        self.session.test(IpAddr::V4(ip)).unwrap()
    }

    /// Members by way of a saved file: the crate's `list` takes memory of the C library for a Rust string.
    fn members(&mut self) -> Vec<Member> {
        let path = self.files.path().join("saved");
        self.session
            .save(path.to_str().unwrap().to_owned())
            .unwrap();
        let saved = std::fs::read_to_string(&path).unwrap();
        let prefix = format!("add {} ", self.name);
        let member = |line: &str| {
            let line = line.strip_prefix(&prefix)?;
            let (ip, comment) = match line.split_once(" comment ") {
                Some((ip, comment)) => (ip, Some(comment.trim_matches('"').to_owned())),
                None => (line, None),
            };
            Some(Member {
                set: self.name.clone(),
                ip: ip.trim().parse().unwrap(),
                comment,
            })
        };
        let mut members: Vec<Member> = saved.lines().filter_map(member).collect();
        members.sort_by_key(|member| member.ip);
        members
    }
}

fn member(set: &str, ip: impl Into<IpAddr>, comment: Option<&str>) -> Member {
    Member {
        set: set.to_owned(),
        ip: ip.into(),
        comment: comment.map(str::to_owned),
    }
}

fn set(name: &str, comments: bool) -> Set {
    Set {
        name: name.to_owned(),
        family: host_net::plan::Family::V4,
        comments,
    }
}

const ONE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 1);
const TWO: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const THREE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 3);

#[test]
fn the_library_reads_and_extends_our_sets() {
    in_a_fresh_netns(|ours| {
        ours.create(&set("shared", true)).unwrap();
        ours.add(&[member("shared", TWO, Some("uid-2"))]).unwrap();
        let mut library = Library::new("shared");
        assert!(library.test(TWO) && !library.test(ONE));
        assert_eq!(library.members(), [member("shared", TWO, Some("uid-2"))]);
        library.add(ONE, Some("uid-1"));
        library.add(THREE, None);
        let expected = [
            member("shared", ONE, Some("uid-1")),
            member("shared", TWO, Some("uid-2")),
            member("shared", THREE, None),
        ];
        assert_eq!(ours.list("shared").unwrap().unwrap(), expected);
        assert_eq!(library.members(), expected);
    });
}

#[test]
fn we_read_and_extend_sets_of_the_library() {
    in_a_fresh_netns(|ours| {
        for comments in [true, false] {
            let name = if comments { "with" } else { "without" };
            let mut library = Library::new(name);
            library.create(comments);
            assert_eq!(ours.create(&set(name, comments)).unwrap(), Made::Existed);
            assert!(ours.create(&set(name, !comments)).is_err());
            let comment = comments.then_some("uid-1");
            library.add(ONE, comment);
            assert_eq!(
                ours.list(name).unwrap().unwrap(),
                [member(name, ONE, comment)]
            );
            ours.add(&[member(name, TWO, None)]).unwrap();
            assert!(library.test(TWO));
            library.del(ONE);
            assert_eq!(
                ours.del(&member(name, ONE, comment)).unwrap(),
                Removal::Absent
            );
            assert_eq!(library.members(), [member(name, TWO, None)]);
        }
    });
}

#[derive(Debug, Clone)]
enum Operation {
    Add(Vec<(u8, Option<String>)>),
    Delete(u8),
    Flush,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    // Few addresses, so that they are added, replaced and removed again and again.
    let comment = || proptest::option::of("[a-zA-Z0-9 _.:/-]{1,40}");
    let operation = prop_oneof![
        6 => vec((1u8..12, comment()), 1..6).prop_map(Operation::Add),
        4 => (1u8..12).prop_map(Operation::Delete),
        1 => Just(Operation::Flush),
    ];
    vec(operation, 1..25)
}

#[test]
fn the_same_operations_leave_the_same_entries() {
    in_a_fresh_netns(|ours| {
        ours.create(&set("ours", true)).unwrap();
        let library = std::cell::RefCell::new(Library::new("theirs"));
        library.borrow_mut().create(true);
        // What the library sees of our set.
        let watching = std::cell::RefCell::new(Library::new("ours"));
        let address = |n: u8| Ipv4Addr::new(10, 0, 0, n);
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 64,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let result = runner.run(&operations(), |operations| {
            let mut library = library.borrow_mut();
            for operation in operations {
                match operation {
                    Operation::Add(entries) => {
                        let members: Vec<Member> = entries
                            .iter()
                            .map(|(n, comment)| member("ours", address(*n), comment.as_deref()))
                            .collect();
                        ours.add(&members).unwrap();
                        for (n, comment) in &entries {
                            library.add(address(*n), comment.as_deref());
                        }
                    }
                    Operation::Delete(n) => {
                        let present = ours.list("ours").unwrap().unwrap();
                        let found = present.into_iter().find(|m| m.ip == address(n));
                        prop_assert_eq!(found.is_some(), library.test(address(n)));
                        if let Some(found) = found {
                            prop_assert_eq!(ours.del(&found).unwrap(), Removal::Removed);
                        }
                        library.del(address(n));
                    }
                    Operation::Flush => {
                        ours.flush("ours").unwrap();
                        library.session.flush().unwrap();
                    }
                }
            }
            let mine = ours.list("ours").unwrap().unwrap();
            prop_assert_eq!(&watching.borrow_mut().members(), &mine);
            let renamed: Vec<Member> = mine
                .into_iter()
                .map(|m| member("theirs", m.ip, m.comment.as_deref()))
                .collect();
            prop_assert_eq!(ours.list("theirs").unwrap().unwrap(), renamed.clone());
            prop_assert_eq!(library.members(), renamed);
            Ok(())
        });
        result.unwrap();
    });
}
