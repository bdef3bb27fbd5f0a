//! A bar chart without a library: every measure has its own scale, because seconds and MiB share none.
//!
//! ```text
//!   pod start, p50      keelson  ▇▇▇▇▇▇▇▇▇ 0.110 s
//!                       kubelet  ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇ 0.200 s
//! ```

use super::{Measure, Report};

const LABEL_WIDTH: f64 = 330.0;
const SUBJECT_WIDTH: f64 = 150.0;
const BAR_WIDTH: f64 = 360.0;
const FIGURE_WIDTH: f64 = 110.0;
const LINE: f64 = 18.0;
const GAP: f64 = 10.0;

/// Readable on white and on black, and for people who see no red or green.
const COLOURS: [&str; 4] = ["#1f77b4", "#d9822b", "#7f7f7f", "#9467bd"];

/// The text follows the reader's light or dark page; the bars do not need to.
const STYLE: &str = "text{font:13px sans-serif;fill:#222}.goal{stroke:#222;stroke-dasharray:3 2}\
    @media(prefers-color-scheme:dark){text{fill:#ddd}.goal{stroke:#ddd}}";

pub(super) fn render(report: &Report) -> String {
    let mut body = String::new();
    let mut top = GAP;
    for measure in &report.measures {
        body.push_str(&text(0.0, top, "start", &measure.name));
        top = bars(&mut body, report, measure, top) + GAP;
    }
    let machine = &report.machine;
    let foot = format!("{} cores, Linux {}; shorter is better", machine.cores, machine.kernel);
    body.push_str(&text(0.0, top, "start", &foot));
    let width = LABEL_WIDTH + SUBJECT_WIDTH + BAR_WIDTH + FIGURE_WIDTH;
    let height = top + LINE + GAP;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n\
         <title>keelson bench {}</title>\n<style>{STYLE}</style>\n{body}</svg>\n",
        escape(report.bench)
    )
}

/// Draws the bars of one measure and returns where they end.
fn bars(body: &mut String, report: &Report, measure: &Measure, mut top: f64) -> f64 {
    let figures = measure.values.values().map(|v| v.figure);
    let longest = figures.chain(measure.goal).fold(f64::MIN_POSITIVE, f64::max);
    let (left, first) = (LABEL_WIDTH + SUBJECT_WIDTH, top);
    for (index, subject) in report.subjects.iter().enumerate() {
        let Some(value) = measure.values.get(subject) else { continue };
        let width = (value.figure / longest * BAR_WIDTH).max(1.0);
        let colour = COLOURS[index % COLOURS.len()];
        body.push_str(&text(left - 8.0, top, "end", subject));
        body.push_str(&format!(
            "<rect x=\"{left}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"13\" fill=\"{colour}\"/>\n",
            top + 2.0
        ));
        body.push_str(&text(left + width + 6.0, top, "start", &measure.unit.text(value.figure)));
        top += LINE;
    }
    if let Some(goal) = measure.goal {
        let x = left + goal / longest * BAR_WIDTH;
        body.push_str(&format!(
            "<line class=\"goal\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{first:.1}\" y2=\"{top:.1}\"/>\n"
        ));
    }
    top
}

fn text(x: f64, top: f64, anchor: &str, content: &str) -> String {
    let y = top + 13.0;
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escape(content))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;

    #[test]
    fn the_longest_bar_is_as_long_as_the_scale_and_others_in_proportion() {
        let svg = super::render(&example());
        assert!(svg.contains("width=\"360.0\""), "{svg}");
        assert!(svg.contains("width=\"198.0\""), "0.11 of 0.2: {svg}");
    }

    #[test]
    fn names_cannot_break_the_markup() {
        let svg = super::render(&example());
        assert!(svg.contains("memory &amp; more"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }

    #[test]
    fn a_measure_of_zero_still_has_a_visible_bar() {
        let mut report = example();
        report.measures[3].values.get_mut("keelson").unwrap().figure = 0.0;
        assert!(super::render(&report).contains("width=\"1.0\""));
    }
}
