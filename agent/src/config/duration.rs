//! Durations as Go writes them: `1h30m`, `10s`, `1.5s`, `250ms`, `0`.

use std::time::Duration;

/// What a duration must look like, for error texts.
pub const EXPECTED: &str = "a duration (such as 10s, 5m0s or 1h30m)";

/// The longest that Go knows; times of the clock plus this never overflow.
const LONGEST: Duration = Duration::from_nanos(i64::MAX.unsigned_abs());

/// Reads a duration; negative ones are refused, and those that are longer than any can be in Go.
pub fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0_f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at_checked(digits)?;
        let number: f64 = number.parse().ok()?;
        rest = after;
        let unit_end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let (unit, after) = rest.split_at_checked(unit_end)?;
        total += number * unit_seconds(unit)?;
        rest = after;
    }
    let total = Duration::try_from_secs_f64(total).ok().filter(|total| *total <= LONGEST);
    if text.is_empty() { None } else { total }
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "h" => 3600.0,
        "m" => 60.0,
        "s" => 1.0,
        "ms" => 1e-3,
        "us" | "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_go_writes() {
        for (text, want) in [
            ("0", 0),
            ("0s", 0),
            ("10s", 10_000),
            ("2m0s", 120_000),
            ("4h0m0s", 14_400_000),
            ("1.5s", 1_500),
            ("250ms", 250),
            ("2562047h", 2_562_047 * 3_600_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(want)), "{text}");
        }
    }

    #[test]
    fn the_longest_duration_can_be_added_to_now() {
        let longest = parse("2562047h").unwrap();
        assert!(std::time::Instant::now().checked_add(longest).is_some());
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "",
            "10",
            "s",
            "ten s",
            "-5s",
            "1d",
            "1..5s",
            "5 s",
            "99999999999999999999h",
            "2562048h",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
