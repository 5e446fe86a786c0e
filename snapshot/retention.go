package snapshot

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// A Retention says which of a volume's snapshots are kept, as restic's users know it:
// the last so many, and the newest one of each of the last so many days, weeks and
// months that have any. A day without snapshots does not count. Zero keeps none by that
// rule, and Unlimited all.
type Retention struct {
	Last, Daily, Weekly, Monthly int

	// Zone is where days begin; nil is the host's.
	Zone *time.Location
}

// Unlimited is a number that is never used up.
const Unlimited = -1

// Empty reports whether nothing would be kept.
func (r Retention) Empty() bool {
	return r.Last == 0 && r.Daily == 0 && r.Weekly == 0 && r.Monthly == 0
}

// A Judgement is what becomes of a snapshot, and by which rules it is kept.
type Judgement struct {
	Description
	Keep bool
	Why  []string // "last", "daily", …
}

// Apply judges snapshots, of each volume by itself: snapshots of images count as one
// volume for each lineage. Only completed ones are judged, the others are left out.
// Within a volume the newest come first; volumes come in the order of their newest.
func (r Retention) Apply(snapshots []Description) []Judgement {
	type volume struct {
		lineage manifest.LineageID
		id      manifest.VolumeID
	}
	of := make(map[volume][]Description)
	var order []volume
	for _, d := range newestFirst(snapshots) {
		v := volume{d.ID.Lineage, d.Volume}
		if of[v] == nil {
			order = append(order, v)
		}
		of[v] = append(of[v], d)
	}
	var verdicts []Judgement
	for _, v := range order {
		verdicts = append(verdicts, r.judge(of[v])...)
	}
	return verdicts
}

// newestFirst returns the completed snapshots, by the moment they are of.
func newestFirst(snapshots []Description) []Description {
	completed := slices.DeleteFunc(slices.Clone(snapshots), func(d Description) bool { return d.State != Completed })
	slices.SortFunc(completed, func(a, b Description) int {
		return cmp.Or(b.Start.Compare(a.Start), cmp.Compare(b.ID.String(), a.ID.String()))
	})
	return completed
}

// judge judges the snapshots of one volume, the newest first.
func (r Retention) judge(snapshots []Description) []Judgement {
	rules := []struct {
		name   string
		left   int
		period func(time.Time) string // in which only the newest is kept
		last   string
	}{
		{name: "last", left: r.Last},
		{name: "daily", left: r.Daily, period: func(t time.Time) string { return t.Format(time.DateOnly) }},
		{name: "weekly", left: r.Weekly, period: func(t time.Time) string {
			year, week := t.ISOWeek()
			return fmt.Sprintf("%d-%d", year, week)
		}},
		{name: "monthly", left: r.Monthly, period: func(t time.Time) string { return t.Format("2006-01") }},
	}
	zone := cmp.Or(r.Zone, time.Local)
	verdicts := make([]Judgement, len(snapshots))
	for i, d := range snapshots {
		v := Judgement{Description: d}
		for k := range rules {
			rule := &rules[k]
			if rule.left == 0 {
				continue
			}
			if rule.period != nil {
				period := rule.period(d.Start.In(zone))
				if period == rule.last {
					continue
				}
				rule.last = period
			}
			rule.left-- // Unlimited never gets back to 0
			v.Keep, v.Why = true, append(v.Why, rule.name)
		}
		verdicts[i] = v
	}
	return verdicts
}
