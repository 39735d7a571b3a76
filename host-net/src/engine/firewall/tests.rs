use super::*;
use crate::plan::Table;

fn chain(rules: &[&str], jump: Option<Position>) -> Chain {
    Chain {
        family: Family::V4,
        table: Table::Mangle,
        name: "OWN".to_owned(),
        rules: texts(rules),
        jump: jump.map(|position| Jump {
            from: "PREROUTING".to_owned(),
            position,
        }),
    }
}

fn single(rule: &str, position: Position) -> Step {
    Step::ChainRule(ChainRule {
        family: Family::V4,
        table: Table::Mangle,
        chain: "OWN".to_owned(),
        rule: rule.to_owned(),
        position,
    })
}

fn texts(rules: &[&str]) -> Vec<String> {
    rules.iter().map(|&rule| rule.to_owned()).collect()
}

fn tables(prerouting: &[&str], own: Option<&[&str]>) -> Tables {
    let mut tables = Tables::default();
    tables.set(Table::Mangle, "PREROUTING", texts(prerouting));
    if let Some(own) = own {
        tables.set(Table::Mangle, "OWN", texts(own));
    }
    tables
}

fn found(tables: &Tables, chain: &Chain, others: &[Step]) -> Vec<Problem> {
    let step = Step::Chain(chain.clone());
    let ours = Ours::of(std::slice::from_ref(&step)).and(others);
    problems(tables, &step, &ours)
}

#[test]
fn a_chain_is_compared_rule_by_rule_in_order() {
    let wanted = chain(&["-j A", "-j B", "-j A"], None);
    let look = |own: &[&str]| found(&tables(&[], Some(own)), &wanted, &[]);
    assert_eq!(look(&["-j A", "-j B", "-j A"]), []);
    assert_eq!(
        look(&["-j A", "-j A", "-j B"]),
        [Problem::Order {
            found: "rule 2 is `-j A`".to_owned()
        }]
    );
    assert_eq!(
        look(&["-j A", "-j X", "-j B", "-j A"]),
        [Problem::Foreign {
            found: texts(&["-j X"])
        }]
    );
    assert_eq!(
        look(&["-j A", "-j B"]),
        [Problem::Different {
            found: "lacks `-j A`".to_owned()
        }]
    );
    assert_eq!(
        look(&["-j X", "-j B", "-j A", "-j X"]),
        [Problem::Different {
            found: "lacks `-j A`; has `-j X`, `-j X`".to_owned()
        }]
    );
    assert_eq!(found(&tables(&[], None), &wanted, &[]), [Problem::Missing]);
}

#[test]
fn the_first_jump_has_only_ours_before_it_and_the_last_one_anything() {
    let own = Some(&["-j A"][..]);
    let first = chain(&["-j A"], Some(Position::First));
    let last = chain(&["-j A"], Some(Position::Last));
    let mut other = chain(&[], Some(Position::First));
    other.name = "OTHER".to_owned();
    let between = tables(&["-j OTHER", "-j OWN", "-j KUBE"], own);
    assert_eq!(
        found(&between, &first, &[]),
        [Problem::Order {
            found: "`-j OTHER` stands before the jump from PREROUTING".to_owned()
        }]
    );
    assert_eq!(found(&between, &first, &[Step::Chain(other)]), []);
    assert_eq!(found(&between, &last, &[]), []);
    assert_eq!(
        found(&tables(&["-j KUBE"], own), &last, &[]),
        [Problem::Different {
            found: "no jump from PREROUTING".to_owned()
        }]
    );
    assert_eq!(
        found(&tables(&["-j OWN", "-j OWN"], own), &first, &[]),
        [Problem::Different {
            found: "2 jumps from PREROUTING".to_owned()
        }]
    );
}

#[test]
fn single_rules_of_other_plans_are_neither_foreign_nor_lost_in_a_refill() {
    let wanted = chain(&["-j B"], None);
    let others = [
        single("-i veth1 -j DROP", Position::First),
        single("-i veth2 -j DROP", Position::Last),
        single("-i gone -j DROP", Position::First),
    ];
    let there = tables(&[], Some(&["-i veth1 -j DROP", "-j B", "-i veth2 -j DROP"]));
    assert_eq!(found(&there, &wanted, &others), []);
    let spoilt = tables(&[], Some(&["-i veth1 -j DROP", "-j X", "-i veth2 -j DROP"]));
    let ours = Ours::of(&[]).and(&others);
    assert_eq!(
        make(&spoilt, &Step::Chain(wanted), &ours),
        [Edit::Fill(
            (Table::Mangle, "OWN".to_owned()),
            texts(&["-i veth1 -j DROP", "-j B", "-i veth2 -j DROP"])
        )]
    );
}

#[test]
fn a_chain_without_rules_of_its_own_is_judged_only_when_the_other_plans_are_known() {
    let step = Step::Chain(chain(&[], None));
    let there = tables(&[], Some(&["-i veth1 -j DROP", "-j ACCEPT"]));
    let alone = Ours::of(std::slice::from_ref(&step));
    assert_eq!(problems(&there, &step, &alone), []);
    let all = alone.and(&[single("-i veth1 -j DROP", Position::Last)]);
    assert_eq!(
        problems(&there, &step, &all),
        [Problem::Foreign {
            found: texts(&["-j ACCEPT"])
        }]
    );
}

#[test]
fn a_misplaced_jump_is_moved_and_a_doubled_one_made_single() {
    let wanted = chain(&["-j A"], Some(Position::First));
    let step = Step::Chain(wanted);
    for prerouting in [&["-j X", "-j OWN"][..], &["-j OWN", "-j X", "-j OWN"]] {
        let mut there = tables(prerouting, Some(&["-j A"]));
        let edits = make(&there, &step, &Ours::of(std::slice::from_ref(&step)));
        there.edit(&edits);
        assert_eq!(there, tables(&["-j OWN", "-j X"], Some(&["-j A"])));
    }
}

#[test]
fn what_stood_there_before_is_not_removed() {
    let wanted = Step::Chain(chain(&["-j A"], Some(Position::First)));
    let there = tables(&["-j OWN"], Some(&["-j A"]));
    let after = |kept: &[Step]| {
        let mut tables = there.clone();
        tables.edit(&unmake(&wanted, kept));
        tables
    };
    assert_eq!(after(&[]), tables(&[], None));
    assert_eq!(
        after(&[Step::Chain(chain(&["-j A"], None))]),
        tables(&[], Some(&["-j A"]))
    );
    assert_eq!(after(std::slice::from_ref(&wanted)), there);
}
