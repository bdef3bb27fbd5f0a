//! The table for the terminal: a measure per line, a subject per column.

use super::{Measure, Report};

pub(super) fn render(report: &Report) -> String {
    let mut lines = vec![header(report)];
    lines.extend(report.measures.iter().map(|measure| line(report, measure)));
    let columns = lines[0].len();
    let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, cells) in lines.iter().enumerate() {
        text.push_str(&justify(cells, &widths));
        if index == 0 {
            let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
            text.push_str(&justify(&rule, &widths));
        }
    }
    let machine = &report.machine;
    text.push_str(&format!(
        "\n{} cores, {} MiB, Linux {}\n",
        machine.cores, machine.memory_mib, machine.kernel
    ));
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

fn header(report: &Report) -> Vec<String> {
    let mut cells = vec![report.bench.to_owned()];
    cells.extend(report.subjects.iter().cloned());
    cells.push("goal".into());
    cells
}

fn line(report: &Report, measure: &Measure) -> Vec<String> {
    let figure = |subject: &String| {
        let value = measure.values.get(subject);
        value.map_or_else(|| "-".into(), |v| measure.unit.text(v.figure))
    };
    let mut cells = vec![measure.name.clone()];
    cells.extend(report.subjects.iter().map(figure));
    cells.push(measure.goal.map(|g| measure.unit.text(g)).unwrap_or_default());
    cells
}

/// Names to the left, figures to the right.
fn justify(cells: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let gap = " ".repeat(width.saturating_sub(cell.chars().count()));
        if index == 0 {
            line.push_str(&format!("{cell}{gap}"));
        } else {
            line.push_str(&format!("  {gap}{cell}"));
        }
    }
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    #[test]
    fn figures_stand_under_their_subject_and_gaps_show() {
        expect![[r#"
            pods             keelson  kubelet v1.36.2     goal
            --------------  --------  ---------------  -------
            pod start, p50   0.110 s          0.200 s  0.120 s
            pod start, p90   0.130 s          0.200 s
            pod start, max   0.130 s          0.200 s
            memory & more   17.0 MiB                -

            2 cores, 4096 MiB, Linux 6.1.0
            note: the machine was busy <otherwise>
        "#]]
        .assert_eq(&super::render(&super::super::tests::example()));
    }
}
