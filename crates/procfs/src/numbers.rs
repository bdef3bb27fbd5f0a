//! Files of numbers, as cgroups have them.

/// The one number of a file such as `memory.current`; `None` for `max` and everything else.
#[must_use]
pub fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.trim().parse().ok()
}

/// The numbers of a file with one on each line, such as `cgroup.procs`.
pub fn numbers(text: &[u8]) -> impl Iterator<Item = u64> {
    text.split(|byte| *byte == b'\n').filter_map(number)
}

/// The value of `key` in a file of `key value` lines, such as `memory.stat`.
#[must_use]
pub fn keyed(text: &[u8], key: &str) -> Option<u64> {
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let value = line.strip_prefix(key.as_bytes())?.strip_prefix(b" ")?;
        number(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_among_other_things() {
        assert_eq!(number(b"42\n"), Some(42));
        assert_eq!(number(b"max\n"), None);
        assert_eq!(numbers(b"1\n\xff\n22\n").collect::<Vec<_>>(), [1, 22]);
        assert_eq!(keyed(b"anon 1\nanon_thp 2\nfile x\n", "anon_thp"), Some(2));
        assert_eq!(keyed(b"anon 1\nfile x\n", "file"), None);
    }
}
