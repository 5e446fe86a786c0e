package snapshot

import (
	"context"

	"github.com/lazyvol/lazyvol/manifest"
)

// CheckInWindows checks a whole store with windows of so many leaves of all roots
// together.
func CheckInWindows(ctx context.Context, s *Store, window int) (*Report, error) {
	c := &checker{at: s, Check: Check{Share: 1}, report: &Report{}, reads: make(places, packReads), window: window}
	err := c.all(ctx)
	c.finish()
	return c.report, err
}

// Verify checks all of a committed snapshot: [Store.Check] of it, with every
// block read. onProblem, if set, is told of each finding.
func (s *Store) Verify(ctx context.Context, id manifest.SnapshotID, onProblem func(error)) (Report, error) {
	report, err := s.Check(ctx, Check{Snapshot: id, Share: 1})
	if err == nil && onProblem != nil {
		for _, f := range report.Findings {
			onProblem(f)
		}
	}
	return *report, err
}

// SurveyedRoots returns how many bytes of roots a survey of a lineage has in memory.
func SurveyedRoots(ctx context.Context, s *Store, lineage manifest.LineageID) (int, error) {
	w, err := s.survey(ctx, lineage, make(sweptSet))
	if err != nil {
		return 0, err
	}
	bytes := 0
	for _, o := range w.outcomes {
		bytes += len(o.Root)
	}
	return bytes, nil
}
