package bench

import (
	"fmt"
	"os"
	"strings"
)

// load is what the machine's processors have done since a moment.
type load struct{ before jiffies }

// jiffies are the kernel's counts of processor time, of all processors together.
type jiffies struct{ all, idle, disk uint64 }

func watchLoad() (*load, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	j, err := parseStat(string(data))
	if err != nil {
		return nil, err
	}
	return &load{before: j}, nil
}

// stop returns the shares of the processors' time in which they were busy (with
// whatever, also outside of this benchmark), and in which they waited for the
// disk.
func (l *load) stop() (busy, disk float64) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0 // it could be read before
	}
	now, err := parseStat(string(data))
	if err != nil {
		return 0, 0
	}
	return now.since(l.before)
}

func (j jiffies) since(earlier jiffies) (busy, disk float64) {
	all := float64(j.all - earlier.all)
	if all <= 0 {
		return 0, 0
	}
	disk = float64(j.disk-earlier.disk) / all
	return 1 - float64(j.idle-earlier.idle)/all - disk, disk
}

// parseStat reads the first line of /proc/stat: user, nice, system, idle,
// iowait, irq, softirq, steal; guests' time is part of user's.
func parseStat(text string) (jiffies, error) {
	line, _, _ := strings.Cut(text, "\n")
	var v [8]uint64
	_, err := fmt.Sscanf(line, "cpu %d %d %d %d %d %d %d %d", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6], &v[7])
	if err != nil {
		return jiffies{}, fmt.Errorf("load: %q: %w", line, err)
	}
	j := jiffies{idle: v[3], disk: v[4]}
	for _, n := range v {
		j.all += n
	}
	return j, nil
}
