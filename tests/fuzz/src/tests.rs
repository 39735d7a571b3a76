#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::record::Settings;
use super::*;

/// Six letters in a row, a refusal of its own after each: nobody finds them by chance in so few inputs.
fn lock(input: &[u8]) -> Verdict {
    let right = input.iter().zip(b"sesame").take_while(|(a, b)| a == b);
    match right.count() {
        6 => Verdict::Taken("open"),
        count => Verdict::Refused(["", "s", "se", "ses", "sesa", "sesam"][count].to_owned() + "-"),
    }
}

#[test]
fn the_search_goes_on_from_what_came_further() {
    let letters: &[&[u8]] = &[b"a", b"b", b"c", b"e", b"m", b"r", b"s", b"t"];
    let target = Target::new("lock", ["x"]).words(letters);
    let found = target.feed(&Settings::of(100_000, 7), lock);
    assert!(found.taken > 0, "{found}");
    assert_eq!(found.ways, 7);
}

#[test]
fn a_seed_is_a_sequence() {
    let inputs = |seed| {
        let seen = RefCell::new(Vec::new());
        let words: &[&[u8]] = &[b"word"];
        let target = Target::new("any", ["some text, 123", "other"])
            .words(words)
            .maker(|random| random.bytes(20));
        target.feed(&Settings::of(2000, seed), |input| {
            seen.borrow_mut().push(input.to_vec());
            lock(input)
        });
        seen.into_inner()
    };
    assert_eq!(inputs(1), inputs(1));
    let (one, two) = (inputs(1), inputs(2));
    assert_eq!(one[..2], two[..2], "the seeds come first, as they are");
    assert_ne!(one[2..], two[2..]);
    let distinct: HashSet<&Vec<u8>> = one.iter().collect();
    assert!(distinct.len() > 1000, "{} different inputs", distinct.len());
}

#[test]
fn panics_silence_and_monotony_fail() {
    let fails = |inputs, check: fn(&[u8]) -> Verdict| {
        let target = Target::new("bad", ["seed"]);
        let run = || target.feed(&Settings::of(inputs, 1), check);
        catch_unwind(AssertUnwindSafe(run)).is_err()
    };
    assert!(fails(100, |input| {
        assert!(!input.contains(&0), "found");
        Verdict::Refused("no".to_owned())
    }));
    assert!(fails(1, |_| Verdict::Refused(String::new())));
    assert!(fails(DEFAULT_INPUTS, |_| Verdict::Taken("always")));
    assert!(!fails(1, |_| Verdict::Taken("always")));
}

#[test]
fn numbers_and_quotations_make_no_new_reason() {
    let signature = |text: &str| Verdict::refused(text).signature();
    assert_eq!(signature("line 3: bad `a`"), signature("line 41: bad `b`"));
    assert_ne!(signature("line 3: bad `a`"), signature("line 3: worse `a`"));
}
