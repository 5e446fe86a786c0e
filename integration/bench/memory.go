package main

import (
	"context"
	"errors"
	"slices"
)

func memoryRows() []row {
	return []row{{"memory", "memory, the most under any of the above", mostMemory, []bar{
		{text: "RSS ≤ 256 MiB", unit: "MiB", got: of(lazyvolName, memory), fixed: 256, less: true, factor: 1},
	}}}
}

// mostMemory sums up what the rows noted so far.
func mostMemory(_ context.Context, r *turn) error {
	most := 0.0
	for _, k := range r.figures.order {
		if k.metric == memory && k.row != r.row {
			most = max(most, slices.Max(r.figures.samples[k]))
		}
	}
	if most == 0 {
		return errors.New("nothing was measured")
	}
	r.record(lazyvolName, memory, most)
	return nil
}
