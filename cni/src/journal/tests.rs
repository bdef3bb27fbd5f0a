use super::*;
use crate::ledger::{Key, Record};

const SOON: Duration = Duration::from_secs(30);

fn take(number: u8) -> Entry {
    Entry::Take(Record {
        key: key(number),
        ips: vec![[10, 0, 0, number].into()],
        host: format!("keel{number}"),
        netns: "/run/netns/x".into(),
        inode: (1, 2),
        boot: "now".to_owned(),
        ports: Vec::new(),
    })
}

fn key(number: u8) -> Key {
    Key { container_id: format!("c{number}"), ifname: "eth0".to_owned() }
}

fn held(folder: &Path) -> Vec<String> {
    let journal = Journal::open(folder, SOON).unwrap();
    journal.ledger().records().map(|record| record.key.container_id.clone()).collect()
}

#[test]
fn entries_are_there_for_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("made/on/demand");
    let mut journal = Journal::open(&folder, SOON).unwrap();
    journal.append(vec![take(1), take(2)]).unwrap();
    journal.unlock_and_sync().unwrap();
    let mut journal = Journal::open(&folder, SOON).unwrap();
    journal.append(vec![Entry::Free(key(1))]).unwrap();
    drop(journal);
    assert_eq!(held(&folder), ["c2"]);
}

#[test]
fn an_unfinished_line_is_cut_off_wherever_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    Journal::open(dir.path(), SOON).unwrap().append(vec![take(1), take(2)]).unwrap();
    let whole = fs::read(dir.path().join("journal")).unwrap();
    let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    for length in 0..whole.len() {
        fs::write(dir.path().join("journal"), &whole[..length]).unwrap();
        let mut journal = Journal::open(dir.path(), SOON).unwrap();
        journal.append(vec![take(3)]).unwrap();
        drop(journal);
        let want: &[&str] = if length >= first { &["c1", "c3"] } else { &["c3"] };
        assert_eq!(held(dir.path()), want, "cut at {length}");
    }
}

#[test]
fn a_mangled_line_costs_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    Journal::open(dir.path(), SOON).unwrap().append(vec![take(1), take(2)]).unwrap();
    let mut text = fs::read(dir.path().join("journal")).unwrap();
    text[30] ^= 1;
    text.extend([0; 50]);
    fs::write(dir.path().join("journal"), text).unwrap();
    assert_eq!(read(&fs::read(dir.path().join("journal")).unwrap()).damaged, 1);
    assert_eq!(held(dir.path()), ["c2"]);
    // The damage is told of once.
    assert_eq!(read(&fs::read(dir.path().join("journal")).unwrap()).damaged, 0);
    assert_eq!(held(dir.path()), ["c2"]);
}

#[test]
fn a_long_history_is_shortened_without_losing_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), SOON).unwrap();
    journal.append(vec![take(1)]).unwrap();
    for _ in 0..1500 {
        journal.append(vec![take(2), Entry::Free(key(2)), take(3), Entry::Free(key(3))]).unwrap();
    }
    let before = journal.ledger().clone();
    drop(journal);
    let journal = Journal::open(dir.path(), SOON).unwrap();
    assert_eq!(journal.ledger(), &before);
    assert!(fs::metadata(dir.path().join("journal")).unwrap().len() < 2000);
}

#[test]
fn a_lock_that_is_held_too_long_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let _held = Journal::open(dir.path(), SOON).unwrap();
    let error = Journal::open(dir.path(), Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, JournalError::Busy { .. }), "{error}");
}

#[test]
fn the_lock_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), SOON).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| Journal::open(dir.path(), SOON).map(drop));
        drop(journal);
        waiting.join().unwrap().unwrap();
    });
}
