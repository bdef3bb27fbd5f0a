//! What a client asked of a log, out of the query of its request.

use jiff::{SignedDuration, Timestamp};

use super::line::Source;

/// The options of `kubectl logs` as they reach a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub since: Option<Timestamp>,
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
    /// Only what was written to this stream.
    pub stream: Option<Source>,
}

/// Reads the options from the pairs of a query.
///
/// # Errors
/// When a value cannot be, in a sentence that names the option.
pub fn parse(query: &[(String, String)], now: Timestamp) -> Result<LogOptions, String> {
    let value = |name: &str| {
        let found = query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        found.filter(|value| !value.is_empty())
    };
    let since_seconds =
        value("sinceSeconds").map(|text| count("sinceSeconds", text, 1)).transpose()?;
    let since_time = value("sinceTime").map(parse_time).transpose()?;
    if since_seconds.is_some() && since_time.is_some() {
        return Err("at most one of sinceTime or sinceSeconds may be specified".to_owned());
    }
    let ago = |secs: u64| {
        let secs = SignedDuration::from_secs(i64::try_from(secs).unwrap_or(i64::MAX));
        now.checked_sub(secs).unwrap_or(Timestamp::MIN)
    };
    Ok(LogOptions {
        follow: value("follow").is_some_and(is_true),
        previous: value("previous").is_some_and(is_true),
        timestamps: value("timestamps").is_some_and(is_true),
        since: since_time.or_else(|| since_seconds.map(ago)),
        tail_lines: value("tailLines").map(|text| count("tailLines", text, 0)).transpose()?,
        limit_bytes: value("limitBytes").map(|text| count("limitBytes", text, 1)).transpose()?,
        stream: match value("stream") {
            None | Some("All") => None,
            Some("Stdout") => Some(Source::Stdout),
            Some("Stderr") => Some(Source::Stderr),
            Some(other) => return Err(format!("stream: {other:?} is not All, Stdout or Stderr")),
        },
    })
}

fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

fn count(name: &str, text: &str, least: u64) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number >= least);
    number.ok_or_else(|| format!("{name}: {text:?} is not a whole number of at least {least}"))
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    text.parse()
        .map_err(|_| format!("sinceTime: {text:?} is not a time (such as 2026-01-02T15:04:05Z)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: &str) -> Result<LogOptions, String> {
        let pairs: Vec<_> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        parse(&pairs, Timestamp::from_second(1000).unwrap())
    }

    #[test]
    fn options_of_kubectl_logs() {
        assert_eq!(read("").unwrap(), LogOptions::default());
        let options = read("follow=true&tailLines=0&sinceSeconds=60&limitBytes=9").unwrap();
        assert!(options.follow && !options.previous);
        assert_eq!(options.tail_lines, Some(0));
        assert_eq!(options.since, Some(Timestamp::from_second(940).unwrap()));
        assert_eq!(read("stream=Stderr").unwrap().stream, Some(Source::Stderr));
    }

    #[test]
    fn values_that_cannot_be_are_named() {
        for (query, want) in [
            ("tailLines=-1", "tailLines"),
            ("limitBytes=0", "limitBytes"),
            ("sinceTime=yesterday", "sinceTime"),
            ("stream=Both", "stream"),
            ("sinceSeconds=1&sinceTime=2026-01-02T15:04:05Z", "at most one"),
        ] {
            assert!(read(query).unwrap_err().contains(want), "{query}");
        }
    }
}
