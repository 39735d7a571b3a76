//! Which lines of two texts differ.

/// Beyond this many pairs of lines a move is no longer told from a replacement; the result stays correct.
const MAX_PAIRS: usize = 4_000_000;

/// Lines only in `old` with `-`, lines only in `new` with `+`, in order; the fewest possible.
pub(super) fn between(old: &[String], new: &[String]) -> Vec<String> {
    let same = |(a, b): &(&String, &String)| a == b;
    let head = old.iter().zip(new).take_while(same).count();
    let (old, new) = (&old[head..], &new[head..]);
    let tail = old.iter().rev().zip(new.iter().rev());
    let tail = tail.take_while(same).count();
    let (old, new) = (&old[..old.len() - tail], &new[..new.len() - tail]);
    if old.len().saturating_mul(new.len()) > MAX_PAIRS {
        return sorted_difference(old, new);
    }
    walk(old, new)
}

/// Follows a longest common subsequence.
fn walk(old: &[String], new: &[String]) -> Vec<String> {
    let width = new.len() + 1;
    let mut common = vec![0_u32; (old.len() + 1) * width];
    for (i, a) in old.iter().enumerate().rev() {
        for (j, b) in new.iter().enumerate().rev() {
            let skip = common[(i + 1) * width + j].max(common[i * width + j + 1]);
            let keep = common[(i + 1) * width + j + 1] + 1;
            common[i * width + j] = if a == b { keep } else { skip };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            i += 1;
            j += 1;
        } else if j == new.len()
            || (i < old.len() && common[(i + 1) * width + j] >= common[i * width + j + 1])
        {
            lines.push(format!("-{}", old[i]));
            i += 1;
        } else {
            lines.push(format!("+{}", new[j]));
            j += 1;
        }
    }
    lines
}

/// Difference as multisets; when there is none but the order, all lines.
fn sorted_difference(old: &[String], new: &[String]) -> Vec<String> {
    let (mut left, mut right) = (old.to_vec(), new.to_vec());
    left.sort();
    right.sort();
    if left == right {
        let gone = old.iter().map(|line| format!("-{line}"));
        let come = new.iter().map(|line| format!("+{line}"));
        return gone.chain(come).collect();
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    loop {
        match (left.get(i), right.get(j)) {
            (Some(a), Some(b)) if a == b => {
                i += 1;
                j += 1;
            }
            (Some(a), b) if b.is_none_or(|b| a < b) => {
                lines.push(format!("-{a}"));
                i += 1;
            }
            (_, Some(b)) => {
                lines.push(format!("+{b}"));
                j += 1;
            }
            _ => return lines,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn only_what_differs_is_listed_in_order() {
        let cases = [
            ("a b c", "a b c", ""),
            ("a b c", "a c", "-b"),
            ("a c", "a b c", "+b"),
            ("a b c", "a x c", "-b +x"),
            ("a a", "a", "-a"),
            ("", "x y", "+x +y"),
            ("a b c d", "b c d a", "-a +a"),
        ];
        for (old, new, expected) in cases {
            let found = between(&lines(old), &lines(new));
            assert_eq!(found, lines(expected), "{old} / {new}");
        }
    }

    #[test]
    fn long_texts_fall_back_to_sets_but_never_to_silence() {
        assert_eq!(
            sorted_difference(&lines("b a c"), &lines("c a d d")),
            lines("-b +d +d")
        );
        assert_eq!(
            sorted_difference(&lines("a b"), &lines("b a")),
            lines("-a -b +b +a")
        );
    }
}
