package snapshot_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// taken returns completed snapshots of one volume, taken at these times, in the
// order given; each is described by its time.
func taken(t *testing.T, volume manifest.VolumeID, times ...string) (all []snapshot.Description) {
	t.Helper()
	lineage := manifest.NewLineageID()
	for _, text := range times {
		at, err := time.Parse(time.DateTime, text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, snapshot.Description{
			ID: manifest.NewSnapshotID(lineage), Volume: volume, State: snapshot.Completed, Start: at, Description: text,
		})
	}
	return all
}

func kept(verdicts []snapshot.Judgement) (lines []string) {
	for _, v := range verdicts {
		if v.Keep {
			lines = append(lines, v.Description.Description+" "+strings.Join(v.Why, ","))
		}
	}
	return lines
}

func TestNewestOfEachPeriodIsKept(t *testing.T) {
	all := taken(t, "vol-1",
		"2026-01-01 00:00:00", // a Thursday, of the week that began in 2025
		"2026-01-04 23:59:59", // the Sunday of that week
		"2026-01-05 00:00:00",
		"2026-01-05 12:00:00",
		"2026-02-01 06:00:00", // nothing was taken in between
		"2026-02-03 06:00:00",
		"2026-02-03 18:00:00",
	)
	slices.Reverse(all[2:5]) // the order does not matter
	for _, c := range []struct {
		rule snapshot.Retention
		want []string
	}{
		{snapshot.Retention{Last: 2}, []string{"2026-02-03 18:00:00 last", "2026-02-03 06:00:00 last"}},
		{snapshot.Retention{Daily: 3}, []string{"2026-02-03 18:00:00 daily", "2026-02-01 06:00:00 daily", "2026-01-05 12:00:00 daily"}},
		{snapshot.Retention{Weekly: 4}, []string{"2026-02-03 18:00:00 weekly", "2026-02-01 06:00:00 weekly", "2026-01-05 12:00:00 weekly", "2026-01-04 23:59:59 weekly"}},
		{snapshot.Retention{Monthly: 5}, []string{"2026-02-03 18:00:00 monthly", "2026-01-05 12:00:00 monthly"}},
		{snapshot.Retention{Last: 1, Daily: 2, Monthly: 2}, []string{"2026-02-03 18:00:00 last,daily,monthly", "2026-02-01 06:00:00 daily", "2026-01-05 12:00:00 monthly"}},
		{snapshot.Retention{Daily: snapshot.Unlimited}, []string{"2026-02-03 18:00:00 daily", "2026-02-01 06:00:00 daily", "2026-01-05 12:00:00 daily", "2026-01-04 23:59:59 daily", "2026-01-01 00:00:00 daily"}},
	} {
		c.rule.Zone = time.UTC
		verdicts := c.rule.Apply(all)
		if got := kept(verdicts); !slices.Equal(got, c.want) {
			t.Errorf("%+v keeps\n\t%s\nwant\n\t%s", c.rule, strings.Join(got, "\n\t"), strings.Join(c.want, "\n\t"))
		}
		if len(verdicts) != len(all) {
			t.Errorf("%+v judges %d of %d snapshots", c.rule, len(verdicts), len(all))
		}
	}
}

func TestDaysBeginWhereTheHostIs(t *testing.T) {
	all := taken(t, "vol-1", "2026-03-01 22:00:00", "2026-03-01 23:30:00")
	east := time.FixedZone("east", 3600)
	for zone, want := range map[*time.Location]int{time.UTC: 1, east: 2} {
		if got := kept(snapshot.Retention{Daily: 9, Zone: zone}.Apply(all)); len(got) != want {
			t.Errorf("in %s: %q, want %d", zone, got, want)
		}
	}
}

func TestEachVolumeKeepsItsOwn(t *testing.T) {
	var all []snapshot.Description
	for n := range 3 {
		all = append(all, taken(t, manifest.VolumeID(fmt.Sprintf("vol-%d", n)), "2026-03-01 22:00:00", "2026-03-02 22:00:00")...)
	}
	images := append(taken(t, "", "2026-03-01 22:00:00"), taken(t, "", "2026-03-01 22:00:00")...) // two lineages
	all = append(all, images...)
	if got := kept(snapshot.Retention{Last: 1, Zone: time.UTC}.Apply(all)); len(got) != 5 {
		t.Errorf("%d are kept: %q", len(got), got)
	}
}

func TestOnlyCompletedSnapshotsAreJudged(t *testing.T) {
	all := taken(t, "vol-1", "2026-03-01 22:00:00", "2026-03-02 22:00:00", "2026-03-03 22:00:00")
	all[2].State = snapshot.Pending // it would else count as the last one
	verdicts := snapshot.Retention{Last: 1}.Apply(all)
	if got := kept(verdicts); len(verdicts) != 2 || !slices.Equal(got, []string{"2026-03-02 22:00:00 last"}) {
		t.Errorf("%d judged, kept %q", len(verdicts), got)
	}
}
