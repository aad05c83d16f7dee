"""The paper's tables 2 and 3 beside what the cost model makes of them.

Run: python demos/paper_tables.py
"""

from mlx_flash.bench.paper import TABLE_2, TABLE_3, model_row


def cell(modelled_s: float, paper_ms: float) -> str:
    if not paper_ms:
        return f"{1e3 * modelled_s:,.0f} / –"
    ratio = 1e3 * modelled_s / paper_ms - 1
    return f"{1e3 * modelled_s:,.0f} / {paper_ms:,.0f} ({ratio:+.0%})"


def main() -> None:
    """Print both tables: modelled / paper, in ms per token on an M1 Max."""
    print("| table | model | method | dtype | I/O | cache | compute |")
    print("|---|---|---|---|---|---|---|")
    for number, table in ((2, TABLE_2), (3, TABLE_3)):
        for row in table:
            cost = model_row(row)
            cells = [cell(cost.io_s, row.io_ms)]
            if number == 3:
                cells.append(cell(cost.cache_s, row.cache_ms))
                cells.append(cell(cost.compute_s, row.compute_ms))
            else:
                cells += ["", ""]
            names = f"{number} | {row.model.name} | {row.method} | {row.dtype}"
            print(f"| {names} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
